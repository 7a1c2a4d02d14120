"""The stage between a model and those who use it: it passes on a model that lost no more than a bound."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from operators import shards
from operators.config import SettingsError
from operators.stage import Stage, StageContext


class NotPromoted(SettingsError):
    """A model lost more than the recipe allows."""


class PromoteStage(Stage):
    """Passes a fine-tuned model on to later stages if an evaluation says that it lost no more than the bounds.

    Later stages name this one as their `model`. If a bound is broken this stage fails, and those after it do not run; the
    fine-tuned model stays where it is. Nothing is copied.
    """

    kind: Literal["promote"] = "promote"
    model: str = Field(description="The stage that made the model.")
    scores: str = Field(description="An evaluate stage that compares it with a model before it (its `before`) on `sets`.")
    max_loss: dict[str, float] = Field(
        min_length=1,
        description="For each set the share of the ability that may be lost: 0.05 keeps 95% of accuracy, or lets perplexity grow "
        "to 1/0.95 of what it was.",
    )
    min_gain: dict[str, float] = Field(
        default={}, description="For each set the share that must have been gained, e.g. `{domain: 0.1}`."
    )
    override: str | None = Field(
        default=None, min_length=8, description="Promote whatever was lost, for this reason, which the manifest keeps."
    )

    resource: ClassVar[str] = "cpu"

    @model_validator(mode="after")
    def _bounds(self) -> PromoteStage:
        wrong = {name: value for name, value in {**self.max_loss, **self.min_gain}.items() if not 0 <= value < 100}
        if wrong or any(value >= 1 for value in self.max_loss.values()):
            raise ValueError("`max_loss` and `min_gain` are shares: 0.05 is 5%; `max_loss` lies between 0 and 1")
        return self

    def input_names(self) -> list[str]:
        return [self.model, self.scores]

    def needs_ray(self) -> bool:
        return False

    def run(self, context: StageContext) -> None:
        scores = shards.load_manifest(context.inputs[self.scores])
        changes = [row for row in scores.stats.get("changes", []) if row["after"] == self.model]
        if not changes:
            raise SettingsError(
                f"stage {context.stage}: stage {self.scores!r} does not compare {self.model!r} with a model before it; name both "
                "among its `models`, and the earlier one as its `before`"
            )
        by_set = {str(row["set"]): row for row in changes}
        unknown = sorted({*self.max_loss, *self.min_gain} - by_set.keys())
        if unknown:
            raise SettingsError(f"stage {context.stage}: stage {self.scores!r} has no set {unknown[0]!r} (it has {sorted(by_set)})")
        broken = []
        for name, bound in self.max_loss.items():
            if by_set[name]["lost"] > bound:
                broken.append(_told(by_set[name], f"more than {bound:.1%}"))
        for name, bound in self.min_gain.items():
            if -by_set[name]["lost"] < bound:
                broken.append(_told(by_set[name], f"a gain below {bound:.1%}"))
        made = context.model_of(self.model)
        if broken and self.override is None:
            raise NotPromoted(
                f"{self.model} is not promoted: {'; '.join(broken)}. The model stays at {made}. Train it otherwise (rehearsal, "
                f"EWC, LoRA, a lower learning rate: docs/forgetting.md), raise the bound, or set `override: REASON` on "
                f"stages.{context.stage} and run again"
            )
        stats: dict[str, Any] = {
            "promoted": self.model, "changes": changes, "broken": broken, "overridden": self.override if broken else None,
        }  # fmt: skip
        manifest = shards.load_manifest(context.inputs[self.model])
        links = {
            name: shards.linked(context.directory, shards.output(context.inputs[self.model], path))
            for name, path in manifest.files.items()
            if isinstance(path, str)
        }
        context.finish(stats=stats, files=links)


def _told(row: dict[str, Any], bound: str) -> str:
    word = "lost" if row["lost"] >= 0 else "gained"
    unit = "accuracy" if row["measure"] == "accuracy" else "nats a token"
    return (
        f"on {row['set']} it {word} {abs(row['lost']):.1%}, {bound} ({unit} {row['before_value']:.4g} in {row['before']}, "
        f"{row['after_value']:.4g} now)"
    )
