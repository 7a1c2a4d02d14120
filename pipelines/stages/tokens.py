"""Recipe stages that turn text into token ids: a tokenizer, then packed sequences."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from cluster import storage
from operators.stage import Stage, StageContext
from operators.synthesis.packaged import PREFIX, resolve_model
from operators.tokens.bpe import LEAST_VOCABULARY, train_stage
from operators.tokens.encode import TokenizerFiles
from operators.tokens.extension import extend_stage
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


class ExtendTokenizerStage(Stage):
    """Adds tokens for a domain to a byte-level BPE tokenizer; ids that exist keep their meaning, and no text gets longer."""

    kind: Literal["extend_tokenizer"] = "extend_tokenizer"
    input: str | list[str] = Field(description="The stages whose kept documents are of the domain.")
    tokenizer: str | None = Field(None, description="The tokenizer stage to extend.")
    tokenizer_path: str | None = Field(
        None, description="Instead of a stage: a directory that holds tokenizer.json, or `packaged:NAME`."
    )
    general: str | list[str] | None = Field(None, description="Stages of general text, on which what changed is measured as well.")
    tokens: int = Field(1000, ge=1, le=1 << 18, description="Tokens to add at most.")
    words: str | None = Field(
        None, description="A UTF-8 file with a word a line, most wanted first: add these instead of what is frequent in the input."
    )
    sample_bytes: int = Field(64 << 20, ge=1 << 10, description="Learn from and measure on about this many bytes of UTF-8 text.")
    document_characters: int = Field(1 << 18, ge=1, description="Use at most this many characters at the start of one document.")
    min_frequency: int = Field(16, ge=2, description="Add only pairs of tokens seen at least this often in the sample.")
    max_token_bytes: int = Field(24, ge=2, description="No new token is longer.")

    @model_validator(mode="after")
    def _one_tokenizer(self) -> ExtendTokenizerStage:
        if (self.tokenizer is None) == (self.tokenizer_path is None):
            raise ValueError("name either `tokenizer` (a stage) or `tokenizer_path` (a directory)")
        return self

    def input_names(self) -> list[str]:
        return [*_names(self.input), *_names(self.general or []), *([self.tokenizer] if self.tokenizer else [])]

    def files(self) -> list[str]:
        path = self.tokenizer_path
        return [*([path] if path and not path.startswith(PREFIX) else []), *([self.words] if self.words else [])]

    def run(self, context: StageContext) -> None:
        words = None
        if self.words:
            lines = storage.read_bytes(context.path(self.words)).decode("utf-8").splitlines()
            words = [line.strip() for line in lines if line.strip()]
        extend_stage(
            context,
            [context.inputs[name] for name in _names(self.input)],
            TokenizerFiles.load(_tokenizer_place(context, self.tokenizer, self.tokenizer_path)),
            general=[context.inputs[name] for name in _names(self.general or [])],
            words=words,
            tokens=self.tokens,
            sample_bytes=self.sample_bytes,
            document_characters=self.document_characters,
            min_frequency=self.min_frequency,
            max_token_bytes=self.max_token_bytes,
        )


def _tokenizer_place(context: StageContext, stage: str | None, path: str | None) -> str:
    """The directory of a tokenizer that a recipe names by stage or path."""
    if stage:
        return context.inputs[stage]
    assert path is not None
    return resolve_model(path, context.cache_directory) if path.startswith(PREFIX) else context.path(path)


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
        pack_stage(
            context,
            [context.inputs[name] for name in _names(self.input)],
            TokenizerFiles.load(_tokenizer_place(context, self.tokenizer, self.tokenizer_path)),
            length=self.length,
            holdout=self.holdout,
            method=self.method,
            window_documents=self.window_documents,
            max_document_tokens=self.max_document_tokens,
        )
