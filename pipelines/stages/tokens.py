"""Recipe stages that turn text into token ids: a tokenizer, then packed sequences."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from operators.stage import Stage, StageContext
from operators.synthesis.packaged import PREFIX, resolve_model
from operators.tokens.bpe import LEAST_VOCABULARY, train_stage
from operators.tokens.encode import TokenizerFiles
from operators.tokens.pack import pack_stage


def _names(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


class TokenizerStage(Stage):
    """Trains a byte-level BPE tokenizer on the rows that its inputs kept, on a sample drawn by document id."""

    kind: Literal["tokenizer"] = "tokenizer"
    input: str | list[str] = Field(description="The stages whose kept documents are learnt from.")
    vocab_size: int = Field(
        32000, ge=LEAST_VOCABULARY, le=1 << 20, description="Tokens in all, the 256 bytes and 4 special tokens included."
    )
    sample_bytes: int = Field(256 << 20, ge=1 << 10, description="Train on about this many bytes of UTF-8 text.")
    document_characters: int = Field(
        1 << 18, ge=1, description="Learn from at most this many characters at the start of one document."
    )
    min_frequency: int = Field(2, ge=1, description="Merge only pairs seen at least this often.")
    max_token_bytes: int = Field(24, ge=2, description="No token is longer, so that boilerplate sentences do not become tokens.")

    def input_names(self) -> list[str]:
        return _names(self.input)

    def run(self, context: StageContext) -> None:
        train_stage(
            context,
            [context.inputs[name] for name in self.input_names()],
            vocab_size=self.vocab_size,
            sample_bytes=self.sample_bytes,
            document_characters=self.document_characters,
            min_frequency=self.min_frequency,
            max_token_bytes=self.max_token_bytes,
        )


class PackStage(Stage):
    """Encodes documents and packs them into sequences of one length, with a flat twin that training maps into memory."""

    kind: Literal["pack"] = "pack"
    version: ClassVar[int] = 2
    input: str | list[str] = Field(description="The stages whose kept documents are packed, in this order.")
    tokenizer: str | None = Field(None, description="The tokenizer stage.")
    tokenizer_path: str | None = Field(
        None, description="Instead of a stage: a directory that holds tokenizer.json, or `packaged:NAME`."
    )
    length: int = Field(ge=8, le=1 << 20, description="Tokens in a sequence.")
    holdout: float = Field(0.0, ge=0.0, lt=1.0, description="Share of documents kept out of training, drawn by id and seed.")
    method: Literal["best_fit", "concatenate"] = Field(
        "best_fit",
        description="best_fit cuts only documents longer than a sequence and pads what is left; "
        "concatenate pads only the end of each window and cuts documents wherever a sequence ends.",
    )
    window_documents: int = Field(4096, ge=1, le=1 << 20, description="Documents that are packed together, in input order.")
    max_document_tokens: int | None = Field(None, ge=1, description="Cut longer documents here; the tokens cut are counted.")

    @model_validator(mode="after")
    def _one_tokenizer(self) -> PackStage:
        if (self.tokenizer is None) == (self.tokenizer_path is None):
            raise ValueError("name either `tokenizer` (a stage) or `tokenizer_path` (a directory)")
        return self

    def input_names(self) -> list[str]:
        return [*_names(self.input), *([self.tokenizer] if self.tokenizer else [])]

    def files(self) -> list[str]:
        return [self.tokenizer_path] if self.tokenizer_path and not self.tokenizer_path.startswith(PREFIX) else []

    def run(self, context: StageContext) -> None:
        path = self.tokenizer_path or ""
        if self.tokenizer:
            place = context.inputs[self.tokenizer]
        else:
            place = resolve_model(path, context.cache_directory) if path.startswith(PREFIX) else context.path(path)
        pack_stage(
            context,
            [context.inputs[name] for name in _names(self.input)],
            TokenizerFiles.load(place),
            length=self.length,
            holdout=self.holdout,
            method=self.method,
            window_documents=self.window_documents,
            max_document_tokens=self.max_document_tokens,
        )
