"""What a reward model and reinforcement learning with verifiable rewards are told. Importing this module loads no framework."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from operators.config import Settings
from train.settings_finetune import FinetuneJob, FinetuneSettings


class RewardModelSettings(FinetuneSettings):
    """How to train a reward model on preference pairs (Bradley-Terry)."""

    max_length: int = Field(
        default=1024,
        ge=8,
        description="Tokens of a prompt with a reply at most; a pair that is longer is set aside and counted, for the end of a "
        "reply is where the score is read.",
    )
    center: float | None = Field(
        default=None,
        gt=0,
        description="Coefficient of (chosen + rejected)^2, which keeps rewards near zero (Eisenstein et al. 2023); 0.01 is usual.",
    )
    margin_weight: float = Field(
        default=1.0,
        ge=0,
        description="The chosen reply must be better by this times the pair's margin (Touvron et al. 2023, equation 2); a pair "
        "without a margin asks for 0. 0 takes no notice of margins.",
    )
    held_out: float = Field(default=0.2, ge=0, lt=1, description="Share of pairs, drawn by id and seed, kept for evaluation.")


class RewardModelJob(RewardModelSettings, FinetuneJob):
    """Everything a reward model depends on; `seed` also draws the head's initial weights and the held-out pairs."""


class _Check(Settings):
    """What all reward functions have in common."""

    weight: float = Field(default=1.0, description="What its score counts in the reward; a negative weight makes it a penalty.")


class ExactAnswer(_Check):
    """1 where the final answer is the reference's, however both are written; no score for a prompt without a reference."""

    check: Literal["exact"]


class NumericAnswer(_Check):
    """1 where the final answer is a number close enough to the reference's; no score for a reference without a number."""

    check: Literal["numeric"]
    relative: float = Field(default=1e-6, ge=0, description="Greatest difference, as a share of the reference.")
    absolute: float = Field(default=1e-9, ge=0, description="Greatest difference that is always accepted.")


class ChoiceAnswer(_Check):
    """1 where the letters that the reply settles on are the reference's."""

    check: Literal["choice"]
    letters: str = Field(default="ABCDEFGHIJ", pattern=r"^[A-Z]{2,26}$", description="Letters that name a choice.")


class PatternCheck(_Check):
    """1 where a regular expression matches the reply; a search that takes too long is a failure with score 0."""

    check: Literal["pattern"]
    pattern: str = Field(min_length=1, description="Regular expression (of the `regex` package).")
    whole: bool = Field(default=True, description="It must match the whole reply; false: somewhere in it.")
    timeout_s: float = Field(default=1.0, gt=0, le=60, description="Seconds for one reply.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        import regex

        try:
            regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"no valid regular expression: {error}") from None
        return pattern


class TagsCheck(_Check):
    """1 where the reply is made of the tags, each once and in order, with nothing but white space around them."""

    check: Literal["tags"]
    tags: list[str] = Field(default=["think", "answer"], min_length=1, description="Names of the tags, in order.")
    partial: bool = Field(
        default=False,
        description="Give the share of opening and closing tags that occur exactly once, up to 0.5, where not all fits.",
    )

    @field_validator("tags")
    @classmethod
    def _are_names(cls, tags: list[str]) -> list[str]:
        wrong = [tag for tag in tags if not tag.replace("_", "").replace("-", "").isalnum()]
        if wrong or len(set(tags)) < len(tags):
            raise ValueError(f"tags are different words without brackets, such as think; got {wrong or tags}")
        return tags


class JsonCheck(_Check):
    """1 where the reply (or what stands in its Markdown fence, or its answer tag) is JSON, and of the schema if one is given."""

    check: Literal["json"]
    json_schema: dict[str, Any] | None = Field(default=None, description="JSON schema (2020-12) that the value must fit.")
    part: Literal["reply", "answer"] = Field(default="reply", description="Look at the whole reply, or inside <answer>.")

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        from operators.synthesis.structured import schema_text

        if schema is not None:
            schema_text(schema, "json_schema")
        return schema


class XmlCheck(_Check):
    """1 where the reply (or what stands in its fence, or its answer tag) is well-formed XML with one root."""

    check: Literal["xml"]
    root: str | None = Field(default=None, description="Name that the root must have.")
    part: Literal["reply", "answer"] = Field(default="reply", description="Look at the whole reply, or inside <answer>.")


class SqlCheck(_Check):
    """1 where every statement of the reply (or of its fence, or its answer tag) parses as SQL of SQLite; nothing is run."""

    check: Literal["sql"]
    tables: str | None = Field(
        default=None, description="CREATE statements of the tables there are; with them unknown tables and columns score 0 too."
    )
    part: Literal["reply", "answer"] = Field(default="reply", description="Look at the whole reply, or inside <answer>.")

    @field_validator("tables")
    @classmethod
    def _are_tables(cls, tables: str | None) -> str | None:
        import sqlite3

        if tables is not None:
            with sqlite3.connect(":memory:") as connection:
                try:
                    connection.executescript(tables)
                except sqlite3.Error as error:
                    raise ValueError(f"no valid CREATE statements of SQLite: {error}") from None
        return tables


class LengthCheck(_Check):
    """1 where the reply's length lies within bounds: words in English; characters, and words of other scripts, in Chinese."""

    check: Literal["length"]
    least: int = Field(default=0, ge=0, description="Shortest reply that scores 1.")
    most: int | None = Field(default=None, ge=1, description="Longest reply that scores 1.")
    slack: int = Field(default=0, ge=0, description="The score falls to 0 over so much beyond the bounds; 0: at once.")

    @model_validator(mode="after")
    def _bounds(self) -> LengthCheck:
        if self.most is None and not self.least:
            raise ValueError("`length` needs `least` or `most`")
        if self.most is not None and self.most < self.least:
            raise ValueError(f"`most` ({self.most}) is less than `least` ({self.least})")
        return self


class LanguageCheck(_Check):
    """1 where the reply is in the language of the prompt's last message, or in the one that is named (by script)."""

    check: Literal["language"]
    language: Literal["prompt", "zh", "en"] = Field(default="prompt", description="The language that is wanted.")
    least_share: float = Field(default=0.5, gt=0, le=1, description="Least share of letters in its script; code is left out.")


class RepetitionCheck(_Check):
    """Minus the share of the reply's n-grams of tokens that occurred before in it: 0 without repetition, near -1 when looping."""

    check: Literal["repetition"]
    ngram: int = Field(default=4, ge=1, le=32, description="Tokens of an n-gram; Chinese characters are tokens.")


class FinishedCheck(_Check):
    """1 where the reply ended by itself, 0 where it was cut at `max_new_tokens`."""

    check: Literal["finished"]


class RewardModelCheck(_Check):
    """The score of a reward model, as a `preferences` stage would have it."""

    check: Literal["reward_model"]
    model: str = Field(description="`@STAGE` that made a reward model, or the directory of one (with a `/`).")
    label: str | None = Field(default=None, description="The label whose score is taken; needed unless the model has one output.")
    max_tokens: int = Field(default=2048, ge=8, description="Longer conversations get no score.")
    batch_tokens: int = Field(default=16384, ge=8, description="Tokens of a forward pass, padding included.")


class CustomCheck(_Check):
    """A function of your own: `function(batch, **arguments)` gets a train.verify.Batch and returns a number for each reply."""

    check: Literal["custom"]
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="Import path, `package.module:function`.")
    arguments: dict[str, Any] = Field(default={}, description="Further arguments, by name.")


Check = Annotated[
    ExactAnswer | NumericAnswer | ChoiceAnswer | PatternCheck | TagsCheck | JsonCheck | XmlCheck | SqlCheck | LengthCheck
    | LanguageCheck | RepetitionCheck | FinishedCheck | RewardModelCheck | CustomCheck,
    Field(discriminator="check"),
]  # fmt: skip


class VllmSettings(Settings):
    """Replies drawn by vLLM instead of by transformers (CUDA only; through TRL)."""

    mode: Literal["colocate", "server"] = Field(
        default="colocate", description="vLLM inside the training processes, or a `trl vllm-serve` of its own."
    )
    url: str | None = Field(default=None, description="Address of the server, for `mode: server`.")
    gpu_memory_share: float = Field(default=0.3, gt=0, lt=1, description="Memory of a GPU that a colocated engine takes.")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs that a colocated engine is cut over.")
    max_model_tokens: int | None = Field(default=None, ge=8, description="Context of a colocated engine. Default: the model's.")
    sleep: bool = Field(default=False, description="Give a colocated engine's memory back during the training step.")

    @model_validator(mode="after")
    def _address(self) -> VllmSettings:
        if (self.mode == "server") != (self.url is not None):
            raise ValueError("`mode: server` needs `url`, and `mode: colocate` has none")
        if self.url is not None and (urlsplit(self.url).scheme not in ("http", "https") or urlsplit(self.url).password):
            raise ValueError("`url` must begin with http:// or https:// and hold no password")
        return self


_TOKEN_LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo")


class GrpoSettings(FinetuneSettings):
    """How to train by verifiable rewards. `batch_examples` counts prompts; each is answered `samples` times."""

    algorithm: Literal["grpo", "rloo"] = Field(
        default="grpo",
        description="grpo: a reply's advantage is its reward less its group's mean (Shao et al. 2024); rloo: less the mean of "
        "the others of its group, over whole replies (Ahmadian et al. 2024).",
    )
    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo"] | None = Field(
        default=None,
        description="Of algorithm grpo. dapo (default): mean over the tokens of the global batch; grpo: over each reply, then "
        "over replies; dr_grpo: over a constant length; bnpo: over the tokens of one forward pass; cispo, sapo, luspo: TRL's.",
    )
    rewards: dict[str, Check] = Field(min_length=1, description="Reward functions by name; the reward is their weighted sum.")
    answer: str | None = Field(
        default=None, description="Column with the reference answer. Default: the last message, if it is the assistant's."
    )
    samples: int = Field(default=8, ge=2, description="Replies drawn for a prompt: its group.")
    micro_batch_examples: int | None = Field(default=None, ge=1, description="Replies of one forward pass on one worker.")
    max_length: int = Field(default=512, ge=8, description="Tokens of a prompt at most; a longer one is set aside and counted.")
    max_new_tokens: int = Field(default=256, ge=1, description="Tokens of a reply at most.")
    temperature: float = Field(default=1.0, gt=0, description="Of sampling.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Least probability mass that is sampled from.")
    top_k: int = Field(default=0, ge=0, description="Most probable tokens that are sampled from; 0: all.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Least probability, as a share of the most probable token's.")
    beta: float = Field(
        default=0.04,
        ge=0,
        description="Weight of the KL divergence from the model that training starts from; 0: no reference is held.",
    )
    iterations: int = Field(default=1, ge=1, description="Steps that are taken on one round of replies.")
    epsilon: float = Field(
        default=0.2, gt=0, description="Clipping of the probability ratio, which matters from the second iteration."
    )
    epsilon_high: float | None = Field(default=None, gt=0, description="Upper clipping, where it differs (0.28 in DAPO).")
    scale_rewards: Literal["group", "batch", "none"] | None = Field(
        default=None,
        description="Divide advantages by the standard deviation of rewards in the group (default of grpo) or in the batch, or not "
        "at all (default of rloo, which knows no `group`).",
    )
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        default="sum_then_normalize", description="Of several reward functions, for grpo: whether each is normalised by itself."
    )
    importance: Literal["token", "sequence"] = Field(
        default="token",
        description="Of algorithm grpo: probability ratios of tokens, or of whole replies (GSPO, Zheng et al. 2025).",
    )
    mask_truncated: bool = Field(default=False, description="Learn nothing from replies that were cut.")
    vllm: VllmSettings | None = Field(default=None, description="Draw replies by vLLM; needs CUDA. Default: by transformers.")

    @model_validator(mode="after")
    def _fits(self) -> GrpoSettings:
        if self.algorithm == "rloo":
            defaults = {"loss": None, "aggregation": "sum_then_normalize", "importance": "token"}
            told = [name for name, value in defaults.items() if getattr(self, name) != value]
            if told:
                raise ValueError(f"`{told[0]}` belongs to `algorithm: grpo`; leave it out for rloo")
            if self.scale_rewards == "group":
                raise ValueError("`scale_rewards: group` belongs to `algorithm: grpo`; rloo knows `batch` and `none`")
        if self.loss == "luspo" and self.importance != "sequence":
            raise ValueError("`loss: luspo` needs `importance: sequence`")
        if self.importance == "sequence" and self.algorithm == "grpo" and (self.loss or "dapo") not in ("grpo", "luspo"):
            raise ValueError("`importance: sequence` needs `loss: grpo` (GSPO) or `luspo`: others would weight replies by length")
        if self.vllm is not None and self.sharding == "fsdp2":
            raise ValueError("`vllm` takes whole weights, which `sharding: fsdp2` has nowhere; use ddp")
        wrong = [name for name in self.rewards if not name.isidentifier()]
        if wrong:
            raise ValueError(f"names of rewards become columns: letters, digits and _ only, not {wrong[0]!r}")
        if not any(check.weight for check in self.rewards.values()):
            raise ValueError("all rewards have weight 0: nothing would be learned")
        return self


class GrpoJob(GrpoSettings, FinetuneJob):
    """Everything a reinforcement learning job depends on; models of rewards are named by their directories."""
