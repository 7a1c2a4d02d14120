"""The recipe stage that measures what each weight of a model matters to what it can do."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from operators.stage import Stage, StageContext
from pipelines.stages.training import Mixed, fisher_path, is_external, limited, model_path, paths, run_job, shares
from train.settings_fisher import FisherSettings


class FisherStage(FisherSettings, Stage):
    """Estimates the diagonal of a model's Fisher information on general data, for the setting `ewc` of training stages.

    A weight with a large entry is one that what the model says depends on. With `previous` it is accumulated over tasks.
    """

    operational: ClassVar[frozenset[str]] = frozenset({"checkpoint_every"})
    resource: ClassVar[str] = "train"

    kind: Literal["fisher"] = "fisher"
    model: str = Field(description="The stage that made the model, a path (with a `/`), or `packaged:NAME`.")
    input: Mixed = Field(
        description="What to remember: a stage with packed sequences, conversations or documents, or stages with their shares."
    )
    previous: str | None = Field(
        default=None, description="A fisher stage (or path) of the tasks before, to accumulate on; the anchor is then this model."
    )

    def _made(self) -> list[str]:
        return [self.model, *([self.previous] if self.previous else [])]

    def input_names(self) -> list[str]:
        return list(dict.fromkeys([*shares(self.input), *(name for name in self._made() if not is_external(name))]))

    def files(self) -> list[str]:
        return paths(self._made())

    def run(self, context: StageContext) -> None:
        config = {
            **self.model_dump(mode="json", include=set(FisherSettings.model_fields)),
            "sequences": limited(self.sequences, context.limit),
            "inputs": [
                {"name": name, "directory": context.inputs[name], **share.told()} for name, share in shares(self.input).items()
            ],
            "model": model_path(context, self.model),
            "previous": fisher_path(context, self.previous) if self.previous else None,
            "seed": context.seed,
        }
        result = run_job(context, "fisher", config)
        stats = {key: value for key, value in result.items() if key != "timings"}
        context.finish(stats=stats, files={"fisher": "fisher"}, timings=result["timings"])
