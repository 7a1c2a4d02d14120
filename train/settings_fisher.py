"""What a Fisher job is told, as typed settings. Importing this module loads no framework."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from operators.config import Settings
from train.settings import RowsInput


class FisherSettings(Settings):
    """How to estimate the diagonal of a model's Fisher information."""

    labels: Literal["sampled", "observed"] = Field(
        default="sampled",
        description="Gradients of the log-likelihood of tokens drawn from the model itself at every position, which gives the "
        "Fisher information; or of the tokens in the data, the empirical Fisher (they differ where the model fits the data "
        "badly: Kunstner et al. 2019).",
    )
    sequences: int = Field(default=1000, ge=1, description="Sequences to use, drawn by seed, none twice.")
    max_length: int = Field(default=512, ge=8, description="Tokens a conversation or document is cut to.")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 runs matrix products under autocast.")
    decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor of `previous`, the Fisher of the tasks before: online EWC's gamma (Schwarz et al. 2018).",
    )
    checkpoint_every: int = Field(default=200, ge=1, description="Sequences between checkpoints.")


class FisherJob(FisherSettings):
    """Everything a Fisher diagonal depends on."""

    inputs: list[RowsInput] = Field(min_length=1, description="Packed corpora, conversations or documents, with weights.")
    model: str = Field(description="Directory of the model, Hugging Face layout, absolute or a URI.")
    previous: str | None = Field(default=None, description="Directory of the Fisher diagonal to accumulate on.")
    seed: int = Field(default=0, description="Of the sequences drawn, and of sampled labels.")

    @model_validator(mode="after")
    def _one_weight(self) -> FisherJob:
        for item in self.inputs:
            if item.loss_weight != 1.0:
                raise ValueError(f"input {item.name!r} has a loss_weight: a Fisher information has none, use `weight`")
        return self
