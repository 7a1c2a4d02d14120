"""What an evaluation is told, as typed settings. Importing this module loads no framework."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from operators.config import Settings

RETENTION = "retention.parquet"
"""The matrix of a chain of fine-tunes, in the directory of an evaluation."""


class NamedModel(Settings):
    """A model under the name that tables show."""

    name: str = Field(description="The stage's name.")
    path: str = Field(description="Directory in Hugging Face layout, absolute or a URI.")


class Prompt(Settings):
    """One prompt that all models answer."""

    text: str = Field(min_length=1, description="What the user says.")
    lang: str = Field(default="", description="Language, for the table.")


class ScoredSet(Settings):
    """A named held-out set: rows of finished stages (conversations, documents, preference pairs), or questions with choices."""

    name: str = Field(description="As tables and bounds name it.")
    measure: Literal["loss", "accuracy"] = Field(
        description="`loss`: nats a token, of replies or of documents; `accuracy`: of choices, or of chosen over rejected replies."
    )
    inputs: list[str] = Field(default=[], description="Directories of stages with conversations, documents or preference pairs.")
    choices: list[str] = Field(default=[], description="Files of questions with choices, absolute or URIs.")
    held_out: float = Field(default=0.0, ge=0, le=1, description="Share of rows that training kept out; 0 scores all.")
    max_rows: int = Field(default=500, ge=1, description="Rows scored at most, drawn by a hash of their id.")
    allow_overlap: bool = Field(default=False, description="Score rows that a model was trained on as well.")


class TrainedOn(Settings):
    """Rows that a training stage was given, to be looked for in evaluation sets."""

    stage: str = Field(description="The training stage.")
    input: str = Field(description="The stage it read.")
    directory: str = Field(description="That stage's directory.")
    held_out: float = Field(default=0.0, ge=0, lt=1, description="Share of the rows it did not train on.")


class ComparedSet(ScoredSet):
    """A set that a fine-tune is scored on before and after."""

    role: Literal["general", "domain"] = Field(description="What is to be kept, or what is to be learnt.")
    automatic: bool = Field(
        default=False,
        description="Nobody asked for it: rows that training holds elsewhere word for word are left out, not refused.",
    )
    source: dict[str, Any] = Field(default={}, description="How the recipe names it; told again in the result.")


class Comparison(Settings):
    """What a training job scores its model on before the first step and after the last."""

    sets: list[ComparedSet] = Field(min_length=1, description="Sets of general ability and of the domain.")
    own: list[TrainedOn] = Field(default=[], description="What the job itself trains on: no set may hold any of it.")
    earlier: list[TrainedOn] = Field(
        default=[], description="What the model was trained on before: no set that was asked for may hold any of it."
    )
    bounded: bool = Field(default=False, description="What is lost is bounded: there must be rows of a general set.")
    length: int = Field(default=512, ge=2, description="Longest row in tokens; a model's own limit may be shorter.")
    cache: str | None = Field(
        default=None, description="Where scores of models before training are kept for other runs. Default: with the job."
    )


class EvaluateSettings(Settings):
    """How to evaluate."""

    max_documents: int = Field(default=100, ge=1, description="Documents scored a language, drawn by a hash of their id.")
    max_tokens: int = Field(default=2048, ge=2, description="Tokens scored of one document.")
    length: int = Field(default=512, ge=2, description="Longest context in tokens; a model's own limit may be shorter.")
    batch_tokens: int = Field(default=8192, ge=2, description="Tokens of one forward pass, padding included.")
    max_pairs: int = Field(default=500, ge=1, description="Preference pairs scored at most.")
    reference: str | None = Field(
        default=None, description="One of `models`: preference accuracy is also given on margins less this model's."
    )
    prompts: list[Prompt] = Field(default=[], description="Prompts that every model answers greedily.")
    max_new_tokens: int = Field(default=48, ge=1, description="Tokens of one reply at most.")


class EvaluateJob(EvaluateSettings):
    """Everything an evaluation depends on."""

    models: list[NamedModel] = Field(min_length=1, description="Models to compare.")
    documents: list[str] = Field(default=[], description="Directories of stages with documents.")
    held_out: float = Field(default=0.0, ge=0, le=1, description="Share of documents kept out of packing.")
    pairs: list[str] = Field(default=[], description="Directories of stages with preference pairs.")
    pairs_held_out: float = Field(default=0.0, ge=0, le=1, description="Share of pairs kept out of DPO; 0 scores all.")
    seed: int = Field(default=0, description="With which documents and pairs were held out.")
    sets: list[ScoredSet] = Field(default=[], description="Named sets that every model is scored on.")
    trained_on: list[TrainedOn] = Field(default=[], description="What the models were trained on: no set may hold any of it.")
    before: dict[str, str] = Field(default={}, description="Model -> the model it was before.")
    retention: dict[str, str] = Field(default={}, description="Models of a chain, in order -> the set each was to learn.")
