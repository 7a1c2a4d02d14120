"""What every training job is told, and pretraining, as typed settings. Importing this module loads no framework."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from operators.config import Settings
from train.schedule import Schedule
from train.settings_evaluate import Comparison

NAMED_SHAPE = "shape:"
"""Before the name of a shape that comes along, where a model is asked for."""


def is_shape(model: object) -> bool:
    """True for a `model` setting that names a shape to start from scratch: `shape:NAME`, or a path that ends in .yaml or .yml."""
    return isinstance(model, str) and (model.startswith(NAMED_SHAPE) or model.endswith((".yaml", ".yml")))


class ModelShape(Settings):
    """A decoder-only transformer: RoPE, grouped-query attention, RMSNorm, SwiGLU; with experts for `qwen3_moe`."""

    architecture: Literal["llama", "qwen3", "qwen3_moe"] = Field(
        default="llama", description="Qwen3 adds RMSNorm on queries and keys, qwen3_moe experts instead of the MLP."
    )
    layers: int = Field(default=4, ge=1, description="Transformer blocks.")
    hidden: int = Field(default=256, ge=8, description="Width of the residual stream.")
    heads: int = Field(default=4, ge=1, description="Query heads.")
    kv_heads: int | None = Field(default=None, ge=1, description="Key and value heads; must divide `heads`. Default: `heads`.")
    head_width: int | None = Field(
        default=None, ge=2, multiple_of=2, description="Width of a head. Default: `hidden` / `heads`, which must divide then."
    )
    intermediate: int | None = Field(
        default=None, ge=8, description="Width of the MLP. Default: 8/3 of `hidden`, rounded up to a multiple of 64."
    )
    experts: int | None = Field(default=None, ge=2, description="Experts of a block (qwen3_moe).")
    experts_per_token: int | None = Field(default=None, ge=1, description="Experts that a token is sent to (qwen3_moe).")
    expert_intermediate: int | None = Field(default=None, ge=8, description="Width of one expert (qwen3_moe).")
    balance_loss: float = Field(default=0.001, ge=0, description="Factor of the loss that balances experts (qwen3_moe).")
    vocab: int | None = Field(default=None, ge=1, description="Rows of the embedding. Default, and least: the tokenizer's size.")
    context: int | None = Field(default=None, ge=8, description="Longest position. Default: the packed length.")
    rope_theta: float = Field(default=10_000.0, gt=0, description="Base of the rotary frequencies.")
    tie_embeddings: bool = Field(default=True, description="One matrix for input and output embeddings.")
    norm_eps: float = Field(default=1e-6, gt=0, description="Epsilon of RMSNorm.")
    initializer: float = Field(default=0.02, gt=0, description="Standard deviation of initial weights.")

    @model_validator(mode="after")
    def _experts(self) -> ModelShape:
        given = {name: getattr(self, name) for name in ("experts", "experts_per_token", "expert_intermediate")}
        if self.architecture == "qwen3_moe":
            missing = [name for name, value in given.items() if value is None]
            if missing:
                raise ValueError(f"qwen3_moe needs {', '.join(missing)}")
            if self.experts_per_token > self.experts:  # type: ignore[operator]
                raise ValueError(f"experts_per_token ({self.experts_per_token}) is more than experts ({self.experts})")
        elif unused := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{self.architecture} has no experts: leave out {', '.join(unused)}, or choose qwen3_moe")
        return self


class RowsInput(Settings):
    """One input of a mixture, as workers are told of it."""

    name: str = Field(description="Name in reports: the stage's name.")
    directory: str = Field(description="The stage's directory, absolute or a URI.")
    weight: float = Field(default=1.0, gt=0, description="Share of the mixture, on any scale.")
    loss_weight: float = Field(default=1.0, gt=0, description="What the loss of its tokens counts, apart from how often they come.")
    held_out: float = Field(default=0.0, ge=0, lt=1, description="Share of its rows, drawn by id and seed, not trained on.")


class Share(Settings):
    """An input of a mixture in a recipe, where its share alone does not say enough."""

    weight: float = Field(gt=0, description="Share of the mixture, on any scale.")
    loss_weight: float = Field(default=1.0, gt=0, description="What the loss of its tokens counts, apart from how often they come.")
    general: bool | None = Field(
        default=None,
        description="It is rehearsed to keep general ability, which its held-out rows measure before and after. Default: documents "
        "of an sft stage are.",
    )

    def told(self) -> dict[str, float]:
        """What a RowsInput is told of it."""
        return {"weight": self.weight, "loss_weight": self.loss_weight}


class EwcTerm(Settings):
    """One quadratic penalty on moving away from a model (elastic weight consolidation, Kirkpatrick et al. 2017)."""

    fisher: str = Field(description="What a `fisher` stage made: in a recipe the stage, or a path (with a `/`).")
    strength: float = Field(
        gt=0,
        description="Factor of 1/2 F (theta - theta*)^2, where F is the stage's Fisher diagonal, of mean 1 for each task: the same "
        "number holds a model as strongly whatever its size, like a weight decay towards theta* of that coefficient.",
    )


class TrackSettings(Settings):
    """Where the curves of a training go besides the run's report."""

    tensorboard: bool = Field(default=True, description="Event files in `tensorboard` of the stage's directory.")
    mlflow: str | None = Field(
        default=None,
        description="Tracking URI of an MLflow server (or a `file:` directory). Credentials come from the workers' environment, "
        "never from the recipe: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
    )
    experiment: str = Field(default="danlu", min_length=1, description="MLflow's experiment.")

    @field_validator("mlflow")
    @classmethod
    def _no_secret(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password is not None:
            raise ValueError("holds a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment")
        return uri


class OptimizerSettings(Settings):
    """What all training has in common."""

    schedule: Schedule = Field(default=Schedule(), description="Warm-up and decay of the learning rate.")
    clip: float = Field(default=1.0, gt=0, description="Largest global norm of the gradient.")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 runs matrix products under autocast.")
    checkpoint_every: int = Field(default=50, ge=1, description="Steps between checkpoints.")
    track: TrackSettings = Field(default=TrackSettings(), description="Curves to TensorBoard files and MLflow.")


class ParallelSettings(Settings):
    """How a model lies over the workers. Losses do not depend on it beyond rounding."""

    sharding: Literal["none", "ddp", "fsdp2"] = Field(
        default="ddp",
        description="Of workers that take other samples: the whole model on each (`ddp`), or weights, gradients and optimizer cut "
        "among them (`fsdp2`); `none` insists on one such worker.",
    )
    tensor: int = Field(
        default=1,
        ge=1,
        description="Workers that take the same samples and share each product. Must divide the workers, the model's heads, "
        "kv_heads and intermediate; with several groups of them these are under `sharding: fsdp2`.",
    )


class PretrainSettings(OptimizerSettings):
    """How to pretrain. Exactly one of `steps` and `tokens` is given."""

    steps: int | None = Field(default=None, ge=1, description="Optimizer steps.")
    tokens: int | None = Field(
        default=None,
        ge=1,
        description="Instead of `steps`: positions to see with padding; steps are this over `batch_sequences` times the packed "
        "length, rounded up.",
    )
    batch_sequences: int = Field(default=8, ge=1, description="Sequences of one step over all workers, who must divide it.")
    micro_batch_sequences: int | None = Field(default=None, ge=1, description="Sequences of one forward pass on one worker.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=0.1, ge=0, description="Of matrices; vectors (norms) have none.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's decay of moments.")
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="Factor of the squared log of the softmax's normaliser, against drifting logits (PaLM, Chowdhery et al. "
        "2022, section 5: 1e-4).",
    )
    parallel: ParallelSettings = Field(default=ParallelSettings(), description="How the model lies over the workers.")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Less memory for more time: `full` keeps just each block's input for the backward pass, `selective` also "
        "attention and every other product.",
    )
    compile: bool = Field(default=False, description="Compile the blocks with torch.compile (on CPU this needs g++).")
    loss_chunk_tokens: int | None = Field(
        default=None, ge=1, description="Tokens whose logits exist at a time. Default: as many as fit a buffer of a fixed size."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints that are kept.")
    ewc: list[EwcTerm] = Field(default=[], description="Penalties on moving away from models, by their Fisher information.")

    @model_validator(mode="after")
    def _one_budget(self) -> PretrainSettings:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of `steps` and `tokens`")
        return self

    def planned_steps(self, length: int) -> int:
        """Optimizer steps for packed rows of `length` tokens."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // (self.batch_sequences * length))


class PretrainJob(PretrainSettings):
    """Everything a pretraining run depends on."""

    comparison: Comparison | None = Field(default=None, description="What the model is scored on before and after.")

    inputs: list[RowsInput] = Field(min_length=1, description="Packed corpora with their shares of tokens.")
    model: ModelShape | str = Field(
        description="A shape to start from scratch, also as `shape:NAME` or a YAML file; or the directory of a model to go on from."
    )
    seed: int = Field(default=0, description="Of the initial weights and the order of samples.")
    most_steps: int | None = Field(default=None, ge=1, description="A trial run's limit: no more steps than this.")

    @field_validator("model", mode="before")
    @classmethod
    def _shape(cls, model: object) -> object:
        from train.model_shapes import read_shape

        return read_shape(str(model)) if is_shape(model) else model
