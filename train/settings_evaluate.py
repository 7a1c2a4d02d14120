"""What an evaluation is told, as typed settings. Importing this module loads no framework."""

from __future__ import annotations

from pydantic import Field

from operators.config import Settings


class NamedModel(Settings):
    """A model under the name that tables show."""

    name: str = Field(description="The stage's name.")
    path: str = Field(description="Directory in Hugging Face layout, absolute or a URI.")


class Prompt(Settings):
    """One prompt that all models answer."""

    text: str = Field(min_length=1, description="What the user says.")
    lang: str = Field(default="", description="Language, for the table.")


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
