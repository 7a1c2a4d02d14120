"""Recipe stages that choose among kept rows: the best or a sample of each group, and a mixture by shares."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from operators.sampling.card import CardSettings
from operators.sampling.choose import mix_stage, select_stage
from operators.sampling.contents import Counted, Unit
from operators.sampling.keys import INPUT, Combine, Order
from operators.stage import Stage, StageContext
from operators.tokens.encode import TokenizerFiles


class _Choosing(Stage):
    """What both stages are told: which rows, how they are measured, by which tokenizer."""

    unit: Unit = Field(
        "documents",
        description="what sizes are measured in; `tokens` needs a tokenizer and encodes every row, `estimated_tokens` counts 4 "
        "letters or 1.4 Chinese characters as one",
    )
    count: Counted = Field("all", description="of conversations and pairs: all messages, or the assistant's replies only")
    tokenizer: str | None = Field(None, description="the tokenizer stage, for `unit: tokens`")
    tokenizer_path: str | None = Field(None, description="instead of a stage: a directory that holds tokenizer.json")

    @model_validator(mode="after")
    def _tokens_need_a_tokenizer(self) -> _Choosing:
        given = (self.tokenizer is not None) + (self.tokenizer_path is not None)
        if given != (self.unit == "tokens"):
            raise ValueError("name `tokenizer` (a stage) or `tokenizer_path` (a directory) with `unit: tokens`, and only then")
        return self

    def files(self) -> list[str]:
        return [self.tokenizer_path] if self.tokenizer_path else []

    def _tokenizer(self, context: StageContext) -> bytes | None:
        if self.unit != "tokens":
            return None
        place = context.inputs[self.tokenizer] if self.tokenizer else context.path(self.tokenizer_path or "")
        return TokenizerFiles.load(place).model

    def _with_tokenizer(self, names: list[str]) -> list[str]:
        return [*names, *([self.tokenizer] if self.tokenizer else [])]


class SelectStage(_Choosing):
    """Keeps the best rows by score, or a random sample, of all rows or of each group (a stratified selection).

    The exact quantile is found without collecting rows. Writes no rows: later stages read the inputs' parts through
    bitmaps; `removed/*.parquet` lists every row left out with its score. Ties and samples go by a seeded hash of the id.
    """

    kind: Literal["select"]
    input: str | list[str] = Field(description="the stage or stages to choose from")
    scores: dict[str, float] = Field(
        default_factory=dict, description="columns to choose by and their weights, e.g. `{quality: 1}`; without any, by chance"
    )
    combine: Combine = Field(
        "mean", description="how several scores become one: weighted mean or geometric mean; min or max of score x weight"
    )
    order: Literal["highest", "lowest"] = Field("highest", description="which scores are kept; a row without score goes first")
    within: list[str] = Field(
        default_factory=list, description="columns whose values make the groups, e.g. [lang]; `input` is the input stage"
    )
    fraction: float | None = Field(None, gt=0, le=1, description="share of each group's size to keep")
    amount: int | None = Field(None, ge=1, description="instead: size of each group to keep, in `unit`s")

    @model_validator(mode="after")
    def _one_target(self) -> SelectStage:
        if (self.fraction is None) == (self.amount is None):
            raise ValueError("give either `fraction` or `amount`")
        if any(not weight > 0 for weight in self.scores.values()):
            raise ValueError("weights of `scores` must be above 0; `order: lowest` turns the order round")
        return self

    def _inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def input_names(self) -> list[str]:
        return self._with_tokenizer(self._inputs())

    def run(self, context: StageContext) -> None:
        scores, highest = tuple(self.scores.items()), self.order == "highest"
        order = Order(context.seed, self.unit, tuple(self.within), scores, self.combine, highest, self.count)
        select_stage(context, self._inputs(), order, fraction=self.fraction, amount=self.amount, tokenizer=self._tokenizer(context))


class MixStage(_Choosing):
    """Mixes documents, conversations or preference pairs to given shares, leaving rows out of what is plenty and repeating
    what is scarce.

    Shares are those of the sizes in `unit`s, exact to one row a group. Writes no rows: a repeated part is read again
    through another bitmap. A data card (README.md, README.zh-CN.md) states the mixture.
    """

    version: ClassVar[int] = 2
    operational: ClassVar[frozenset[str]] = frozenset({"card"})

    kind: Literal["mix"]
    input: str | list[str] | dict[str, float] = Field(description="the stages to mix; a mapping gives each stage its weight")
    by: list[str] = Field(
        default_factory=lambda: [INPUT],
        description="columns whose values make the groups, joined by `|`; `input` is the stage, `turns` tells multi_turn from "
        "single_turn conversations, `provenance.operation` is a field of a column",
    )
    shares: dict[str, dict[str, float]] | None = Field(
        None,
        min_length=1,
        description="instead of weights: shares along several such columns, all met at once, e.g. `{turns: {multi_turn: 0.7, "
        "single_turn: 0.3}, input: {general: 0.08}}`; values without a share divide what is left of 1 by their sizes",
    )
    weights: dict[str, float] | None = Field(None, description="weight of each group; `*` is that of every other group")
    temperature: float = Field(
        1.0, gt=0, description="without weights: shares go as size ** (1 / temperature); 1 keeps them, more evens them out"
    )
    total: int | None = Field(None, ge=1, description="size of the mixture; left out, the largest that keeps to `max_repeats`")
    max_repeats: float = Field(1.0, gt=0, description="how often a group's rows may be used at most")
    card: CardSettings = Field(CardSettings(), description="what the data card says beside what was counted")

    @model_validator(mode="after")
    def _one_way_to_weigh(self) -> MixStage:
        if isinstance(self.input, dict) and (self.weights is not None or self.by != [INPUT]):
            raise ValueError("give weights either with `input` or with `by` and `weights`")
        if self.temperature != 1.0 and (self.weights is not None or isinstance(self.input, dict)):
            raise ValueError("give either weights or a `temperature`")
        if self.shares is not None:
            if isinstance(self.input, dict) or self.weights is not None or self.by != [INPUT] or self.temperature != 1.0:
                raise ValueError("give either `shares`, or weights with `input` or `by`, or a `temperature`")
            if any(not 0 <= share <= 1 for line in self.shares.values() for share in line.values()):
                raise ValueError("a share is a number from 0 to 1")
        unknown = [name for name in self.card.licenses if name not in self._inputs()]
        if unknown:
            raise ValueError(f"`card.licenses` names {unknown}, which are no inputs")
        given = self.input if isinstance(self.input, dict) else self.weights or {}
        if any(not weight >= 0 for weight in given.values()):
            raise ValueError("a weight is a number of at least 0")
        return self

    def _inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def input_names(self) -> list[str]:
        return self._with_tokenizer(self._inputs())

    def run(self, context: StageContext) -> None:
        mix_stage(
            context,
            self._inputs(),
            Order(context.seed, self.unit, tuple(self.shares or self.by), counted=self.count),
            shares=self.shares,
            card=self.card,
            weights=dict(self.input) if isinstance(self.input, dict) else self.weights,
            temperature=self.temperature,
            total=self.total,
            max_repeats=self.max_repeats,
            tokenizer=self._tokenizer(context),
        )
