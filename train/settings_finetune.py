"""What fine-tuning and alignment jobs are told, as typed settings. Importing this module loads no framework."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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


class FinetuneSettings(OptimizerSettings):
    """What SFT and DPO have in common."""

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


class FinetuneJob(FinetuneSettings):
    """The part of a fine-tuning job that is not settings."""

    model: str = Field(description="Directory of the model to start from, Hugging Face layout, absolute or a URI.")
    inputs: list[RowsInput] = Field(min_length=1, description="Inputs with their weights.")
    seed: int = Field(default=0, description="Of the adapters' initial weights and the order of samples.")


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
