"""What fine-tuning and alignment jobs are told, as typed settings. Importing this module loads no framework."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from operators.config import Settings
from train.settings import OptimizerSettings, RowsInput


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
    micro_batch_examples: int | None = Field(default=None, ge=1, description="Examples of one forward pass on one worker.")
    max_length: int = Field(
        default=512, ge=8, description="Tokens an example is cut to; one without a token with loss left is set aside and counted."
    )
    lora: LoraSettings | None = Field(
        default=None, description="Train adapters and export the merged model too; without it all weights are trained."
    )
    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
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

    @property
    def planned_steps(self) -> int:
        """The steps of a settled job (`finetune.settled`). Raises ValueError while they follow from `epochs`."""
        if self.steps is None:
            raise ValueError("the steps are not settled yet: they follow from `epochs` once the examples are counted")
        return self.steps


class SftSettings(FinetuneSettings):
    """How to fine-tune on conversations."""

    neftune_alpha: float | None = Field(default=None, gt=0, description="NEFTune noise on embeddings (Jain et al. 2023).")


class SftJob(SftSettings, FinetuneJob):
    """Everything a supervised fine-tuning depends on."""


class DpoSettings(FinetuneSettings):
    """How to align by preference pairs."""

    beta: float = Field(default=0.1, gt=0, description="How strongly the model is held to its reference.")
    loss: Literal["sigmoid", "ipo", "hinge"] = Field(
        default="sigmoid", description="DPO, IPO (Azar et al. 2023), or SLiC's hinge (Zhao et al. 2023)."
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="Assumed share of pairs labelled the wrong way round.")
    held_out: float = Field(default=0.2, ge=0, lt=1, description="Share of pairs, drawn by id and seed, kept for evaluation.")


class DpoJob(DpoSettings, FinetuneJob):
    """Everything an alignment by preference pairs depends on; `seed` also draws the held-out pairs."""
