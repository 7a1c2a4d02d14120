"""What fine-tuning and alignment jobs are told, as typed settings. Importing this module loads no framework."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field, model_validator

from operators.config import Settings
from train.settings import EwcTerm, OptimizerSettings, RowsInput
from train.settings_evaluate import Comparison


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021): the base stays frozen, a rank-r product is added to chosen matrices."""

    rank: int = Field(default=16, ge=1, description="Rank of the added product.")
    alpha: int = Field(default=32, ge=1, description="The product is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapter.")
    targets: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="Names of the matrices with an adapter; `all-linear` is every one but the output head."
    )
    dora: bool = Field(
        default=False, description="Train the magnitude of each column apart from its direction (DoRA, Liu et al. 2024)."
    )
    rslora: bool = Field(
        default=False, description="Scale by alpha / sqrt(rank) instead, which suits high ranks (Kalajdzievski 2023)."
    )
    quantize: Literal["none", "nf4"] = Field(
        default="none",
        description="Hold the frozen base in 4-bit NormalFloat (QLoRA, Dettmers et al. 2023): needs CUDA and bitsandbytes. The "
        "export merges into the unquantised base.",
    )


class FinetuneSettings(OptimizerSettings):
    """What SFT and alignment have in common. Exactly one of `steps` and `epochs` is given."""

    steps: int | None = Field(default=None, ge=1, description="Optimizer steps.")
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="Instead of `steps`: passes over the input with the largest share of samples; the steps follow once the "
        "examples are counted, and are stated before the first one.",
    )
    mix_by: Literal["examples", "tokens"] = Field(
        default="examples",
        description="What the weights of inputs are shares of: examples, or tokens with loss (longer examples count more).",
    )
    batch_examples: int = Field(default=8, ge=1, description="Examples of one step over all workers, who must divide it.")
    micro_batch_examples: int | None = Field(
        default=None,
        ge=1,
        description="Examples of one forward pass on one worker. Default: all of its share; in SFT those of like length.",
    )
    max_length: int = Field(
        default=512, ge=8, description="Tokens an example is cut to; one without a token with loss left is set aside and counted."
    )
    lora: LoraSettings | None = Field(
        default=None, description="Train adapters and export the merged model too; without it all weights are trained."
    )
    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    chat_template: str | None = Field(
        default=None,
        description="Instead of the tokenizer's own: chatml, llama3, gemma, llama2, mistral, alpaca (plain text, for a base "
        "model), or a file (with a `/`) of a Jinja template.",
    )
    sharding: Literal["none", "ddp", "fsdp2"] = Field(
        default="ddp",
        description="With several workers: the whole model on each (`ddp`), or weights, gradients and optimizer cut among them "
        "(`fsdp2`); `none` insists on one worker.",
    )
    activation_checkpointing: bool = Field(
        default=False, description="Compute activations again in the backward pass instead of keeping them: less memory, slower."
    )

    @model_validator(mode="after")
    def _one_length(self) -> FinetuneSettings:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        return self


class FinetuneJob(FinetuneSettings):
    """The part of a fine-tuning job that is not settings."""

    model: str = Field(description="Directory of the model to start from, Hugging Face layout, absolute or a URI.")
    inputs: list[RowsInput] = Field(min_length=1, description="Inputs with their weights.")
    seed: int = Field(default=0, description="Of the adapters' initial weights and the order of samples.")
    most_steps: int | None = Field(default=None, ge=1, description="A trial run's limit: no more steps than this.")
    comparison: Comparison | None = Field(default=None, description="What the model is scored on before and after.")

    @property
    def planned_steps(self) -> int:
        """The steps of a settled job (`finetune.settled`). Raises ValueError while they follow from `epochs`."""
        if self.steps is None:
            raise ValueError("the steps are not settled yet: they follow from `epochs` once the examples are counted")
        return self.steps


class SftSettings(FinetuneSettings):
    """How to fine-tune on conversations."""

    neftune_alpha: float | None = Field(default=None, gt=0, description="NEFTune noise on embeddings (Jain et al. 2023).")
    ewc: list[EwcTerm] = Field(default=[], description="Penalties on moving away from models, by their Fisher information.")
    packing: bool = Field(
        default=False,
        description="Lay the examples of a step end to end in rows of `max_length` tokens instead of padding them; they do not "
        "see each other, and losses stay what they are. `micro_batch_examples` counts rows then.",
    )
    held_out: float = Field(
        default=0.0, ge=0, lt=1, description="Share of examples, drawn by id and seed, that is not trained on but measured."
    )
    evaluate_every: int = Field(
        default=50, ge=1, description="Steps between measures of the held-out loss; the weights with the lowest are exported."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop early after so many measures of the held-out loss without a lower one."
    )

    @model_validator(mode="after")
    def _patience_needs_a_measure(self) -> SftSettings:
        if self.patience is not None and not self.held_out:
            raise ValueError("`patience` needs `held_out`: early stopping looks at the loss of held-out examples")
        return self


class SftJob(SftSettings, FinetuneJob):
    """Everything a supervised fine-tuning depends on."""


REFERENCE_FREE = frozenset({"orpo", "simpo", "cpo"})
"""Losses that compare the two replies with each other, not with what a reference model says of them."""

_SMOOTHED = frozenset({"robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo"})
_DIVERGENT = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"})
_UNWEIGHTED = frozenset({"aot", "aot_unpaired", "sft"})

PreferenceLoss = Literal[
    "sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "orpo", "simpo", "cpo",
]  # fmt: skip


class DpoSettings(FinetuneSettings):
    """How to align by preference pairs."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="How strongly the model is held to its reference (for `ipo` its tau; for `orpo` the weight of the odds ratio; "
        "for `simpo` and `cpo`, which have no reference, the scale of the difference: 2 and more is usual for `simpo`).",
    )
    loss: PreferenceLoss | dict[PreferenceLoss, float] = Field(
        default="sigmoid",
        description="`sigmoid` is DPO. One loss, or several with weights: `{sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}`. Without a "
        "reference: `orpo`, `simpo`, `cpo` (the last two may be joined by `sft`).",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Assumed share of pairs labelled the wrong way round: of `robust` and `exo_pair`, which need it, and of `aot`, "
        "`aot_unpaired`, `simpo` and `cpo`.",
    )
    ld_alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="What tokens beyond the shorter reply's length count (LD-DPO, Liu et al. 2024), against a taste for length.",
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        default="reverse_kl", description="The distance from the reference that is kept small (f-DPO, Wang et al. 2023)."
    )
    f_alpha: float = Field(default=0.5, description="Of `f_divergence: alpha_divergence`.")
    weighting: bool = Field(
        default=False, description="Weight pairs by how likely the model itself is to write them (WPO, Zhou et al. 2024)."
    )
    discopop_tau: float = Field(default=0.05, gt=0, description="Temperature of `discopop`.")
    simpo_gamma: float = Field(default=0.5, ge=0, description="The margin that `simpo` aims at.")
    held_out: float = Field(default=0.2, ge=0, lt=1, description="Share of pairs, drawn by id and seed, kept for evaluation.")

    @property
    def losses(self) -> dict[str, float]:
        """Weight of each loss."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else {str(name): weight for name, weight in self.loss.items()}

    @property
    def reference_free(self) -> bool:
        """True when no reference model has a say."""
        return bool(REFERENCE_FREE & self.losses.keys())

    @model_validator(mode="after")
    def _losses_fit(self) -> DpoSettings:
        names = self.losses.keys()
        free = sorted(REFERENCE_FREE & names)
        if not names or any(weight <= 0 for weight in self.losses.values()):
            raise ValueError("`loss` needs at least one loss, each with a weight above 0")
        if names == {"sft"}:
            raise ValueError("`loss: sft` alone learns nothing from the rejected replies: add another, or use an sft stage")
        if free and (len(free) > 1 or names - {free[0], "sft"} or (free == ["orpo"] and len(names) > 1)):
            raise ValueError(
                f"`{free[0]}` has no reference and cannot be joined by {', '.join(sorted(names - {free[0]}))}"
                + (" (it holds an `sft` term already)" if free[0] == "orpo" else "; only `sft` may join it")
            )
        self._refuse(self.label_smoothing > 0 and not names & _SMOOTHED, "label_smoothing", _SMOOTHED)
        for name in ("robust", "exo_pair"):
            if name in names and not self.label_smoothing:
                raise ValueError(f"`{name}` needs `label_smoothing` above 0: 0.1 is usual for robust, 0.001 for exo_pair")
        diverges = self.f_divergence != "reverse_kl"
        self._refuse(diverges and not names <= _DIVERGENT, f"f_divergence: {self.f_divergence}", _DIVERGENT)
        if self.f_alpha != DpoSettings.model_fields["f_alpha"].default and self.f_divergence != "alpha_divergence":
            raise ValueError("`f_alpha` belongs to `f_divergence: alpha_divergence`")
        for key, owner in (("discopop_tau", "discopop"), ("simpo_gamma", "simpo")):
            changed = getattr(self, key) != DpoSettings.model_fields[key].default
            self._refuse(changed and owner not in names, key, {owner})
        if self.weighting and names & (_UNWEIGHTED | REFERENCE_FREE):
            raise ValueError(f"`weighting` does not go with {', '.join(sorted(names & (_UNWEIGHTED | REFERENCE_FREE)))}")
        if self.ld_alpha is not None and free:
            raise ValueError(f"`ld_alpha` does not go with `{free[0]}`, which averages over tokens or sums them as they are")
        return self

    def _refuse(self, wrong: bool, key: str, owners: Collection[str]) -> None:
        if wrong:
            raise ValueError(f"`{key}` belongs to {', '.join(sorted(owners))}; the loss is {', '.join(self.losses)}")


class DpoJob(DpoSettings, FinetuneJob):
    """Everything an alignment by preference pairs depends on; `seed` also draws the held-out pairs."""

    reference_cache: str | None = Field(
        default=None, description="Where log-probabilities of the reference are kept for other runs. Default: with the job."
    )


class KtoSettings(FinetuneSettings):
    """How to align by single replies marked good or bad."""

    loss: Literal["kto", "apo_zero_unpaired"] = Field(
        default="kto",
        description="KTO (Ethayarajh et al. 2024), or APO-zero (D'Oosterlinck et al. 2024), which has no term of the batch.",
    )
    beta: float = Field(default=0.1, gt=0, description="How strongly the model is held to its reference.")
    desirable_weight: float = Field(default=1.0, gt=0, description="What good replies count in the loss.")
    undesirable_weight: float = Field(
        default=1.0,
        gt=0,
        description="What bad replies count. Where one kind is rarer, number times weight of the good should be 1 to 1.33 "
        "times that of the bad (the paper's equation 8).",
    )


class KtoJob(KtoSettings, FinetuneJob):
    """Everything an alignment by marked replies depends on."""

    reference_cache: str | None = Field(
        default=None, description="Where log-probabilities of the reference are kept for other runs. Default: with the job."
    )


class MergeSettings(Settings):
    """How to write a model with its adapters merged in."""

    dtype: Literal["fp32", "bf16"] | None = Field(
        default=None, description="What weights are cast to once all sums are made in fp32. Default: as the base is stored."
    )
    max_shard_size: str = Field(
        default="5GB", pattern=r"^[1-9][0-9]*(KB|MB|GB)$", description="Weights beyond this go to further files, with an index."
    )


class MergeJob(MergeSettings):
    """Everything a merge depends on."""

    model: str = Field(description="Directory of the base, Hugging Face layout, absolute or a URI.")
    adapters: list[str] = Field(min_length=1, description="Directories of PEFT adapters, merged one after another.")
