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
    scores: str | None = Field(
        default=None,
        description="An evaluate stage that compares it with a model before it (its `before`) on `sets`. Default: what the stage "
        "that made the model has measured before and after by itself.",
    )
    max_loss: float | dict[str, float] = Field(
        description="For each set the share of the ability that may be lost: 0.05 keeps 95% of accuracy, or lets perplexity grow "
        "to 1/0.95 of what it was. One number, without `scores`, is for all sets of general ability.",
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
        lost = self.max_loss if isinstance(self.max_loss, dict) else {"*": self.max_loss}
        if not lost:
            raise ValueError("`max_loss` needs a bound for at least one set")
        if self.scores is not None and not isinstance(self.max_loss, dict):
            raise ValueError("with `scores` say which sets `max_loss` is for: {general: 0.05}")
        wrong = {name: value for name, value in {**lost, **self.min_gain}.items() if not 0 <= value < 100}
        if wrong or any(value >= 1 for value in lost.values()):
            raise ValueError("`max_loss` and `min_gain` are shares: 0.05 is 5%; `max_loss` lies between 0 and 1")
        return self

    def input_names(self) -> list[str]:
        return [self.model, *([self.scores] if self.scores is not None else [])]

    def needs_ray(self) -> bool:
        return False

    def run(self, context: StageContext) -> None:
        changes, where = self._changes(context)
        by_set = {str(row["set"]): row for row in changes}
        bounds = self.max_loss if isinstance(self.max_loss, dict) else self._general(context, by_set, self.max_loss)
        unknown = sorted({*bounds, *self.min_gain} - by_set.keys())
        if unknown:
            raise SettingsError(f"stage {context.stage}: stage {where!r} has no set {unknown[0]!r} (it has {sorted(by_set)})")
        broken = []
        for name, bound in bounds.items():
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

    def _changes(self, context: StageContext) -> tuple[list[dict[str, Any]], str]:
        """What was gained and lost on each set, and the stage that measured it. Raises SettingsError where none did."""
        if self.scores is None:
            made = shards.load_manifest(context.inputs[self.model])
            rows = (made.stats.get("evaluation") or {}).get("sets", [])
            if not rows:
                raise SettingsError(
                    f"stage {context.stage}: stage {self.model!r} scored no set before and after; give it `evaluate`, or name an "
                    "evaluate stage as `scores`"
                )
            sides = {"after": self.model, "before": str(made.config.get("model", "the model before"))}
            return [{**row, **sides, "before_value": row["before"], "after_value": row["after"]} for row in rows], self.model
        rows = shards.load_manifest(context.inputs[self.scores]).stats.get("changes", [])
        changes = [row for row in rows if row["after"] == self.model]
        if not changes:
            raise SettingsError(
                f"stage {context.stage}: stage {self.scores!r} does not compare {self.model!r} with a model before it; name both "
                "among its `models`, and the earlier one as its `before`"
            )
        return changes, self.scores

    def _general(self, context: StageContext, by_set: dict[str, dict[str, Any]], bound: float) -> dict[str, float]:
        bounds = {name: bound for name, row in by_set.items() if row["role"] == "general"}
        if not bounds:
            raise SettingsError(
                f"stage {context.stage}: stage {self.model!r} scored no set of general ability (it has {sorted(by_set)}); name one "
                "under its evaluate.general, or mark an input of it {weight: 0.1, general: true}"
            )
        return bounds


def _told(row: dict[str, Any], bound: str) -> str:
    word = "lost" if row["lost"] >= 0 else "gained"
    unit = "accuracy" if row["measure"] == "accuracy" else "nats a token"
    return (
        f"on {row['set']} it {word} {abs(row['lost']):.1%}, {bound} ({unit} {row['before_value']:.4g} in {row['before']}, "
        f"{row['after_value']:.4g} now)"
    )
