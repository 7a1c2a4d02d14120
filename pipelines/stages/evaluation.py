"""The recipe stage that compares models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from operators import shards
from operators.stage import Stage, StageContext
from pipelines.stages.sets import SetSettings, listed, scored, trained_on
from pipelines.stages.training import is_external, limited, model_path, paths, run_job
from train.settings_evaluate import RETENTION, EvaluateSettings


class EvaluateStage(EvaluateSettings, Stage):
    """Compares models: held-out perplexity by language and source, preference accuracy, replies side by side."""

    version: ClassVar[int] = 4  # pairs in named sets; the retention matrix as rows
    resource: ClassVar[str] = "train"

    kind: Literal["evaluate"] = "evaluate"
    models: list[str] = Field(min_length=1, description="Stages that made models, or paths (with a `/`), in the order of columns.")
    packed: str | None = Field(
        default=None, description="The pack stage whose held-out documents are scored; its `holdout` must be above 0."
    )
    input: str | list[str] | None = Field(default=None, description="The stages whose documents `packed` packed; needed with it.")
    pairs: str | list[str] | None = Field(default=None, description="Stages with preference pairs.")
    pairs_held_out: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of pairs to score. Default: what DPO stages among `models` kept out, or all.",
    )

    sets: dict[str, SetSettings] = Field(
        default={}, description="Named sets, e.g. `general` and `domain`, that every model is scored on; none may be trained on."
    )
    before: str | dict[str, str] | None = Field(
        default=None,
        description="One of `models` with which all others are compared, or for each model the one it was made from: what was "
        "gained and lost on `sets`.",
    )
    retention: dict[str, str] = Field(
        default={},
        description="For a chain of fine-tunes: models in the order they were trained, each with the set it was to learn. Gives "
        "the matrix of scores (also as retention.parquet), average forgetting and backward transfer.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateStage:
        pairs = self.pairs_before()
        unknown = [name for name in [*pairs, *pairs.values(), *self.retention] if name not in self.models]
        if unknown:
            raise ValueError(f"`before` and `retention` name {unknown[0]!r}, which is not one of `models`")
        if any(after == earlier for after, earlier in pairs.items()):
            raise ValueError("`before` compares a model with itself")
        lacking = [name for name in self.retention.values() if name not in self.sets]
        if lacking:
            raise ValueError(f"`retention` names {lacking[0]!r}, which is not one of `sets` ({sorted(self.sets)})")
        if pairs and not self.sets:
            raise ValueError("`before` needs `sets`: what models are compared on")
        if len(set(self.models)) != len(self.models):
            raise ValueError("`models` names one twice")
        if self.reference is not None and self.reference not in self.models:
            raise ValueError(f"`reference` {self.reference!r} is not one of `models`")
        if self.input is not None and self.packed is None:
            raise ValueError("`input` needs `packed`: only documents that were kept out of packing can be scored")
        if self.packed is not None and self.input is None:
            raise ValueError("`packed` needs `input`: the stages whose documents it packed")
        return self

    def pairs_before(self) -> dict[str, str]:
        """Model -> the model it was before."""
        if isinstance(self.before, str):
            return {name: self.before for name in self.models if name != self.before}
        return dict(self.before or {})

    def input_names(self) -> list[str]:
        names = [*(name for name in self.models if not is_external(name)), *listed(self.pairs)]
        names += [name for chosen in self.sets.values() for name in listed(chosen.input)]
        names += [*([self.packed] if self.packed else []), *listed(self.input)]
        return list(dict.fromkeys(names))

    def files(self) -> list[str]:
        return [*paths(self.models), *(path for chosen in self.sets.values() for path in listed(chosen.choices))]

    def run(self, context: StageContext) -> None:
        held_out = 0.0
        if self.packed is not None:
            held_out = float(shards.load_manifest(context.inputs[self.packed]).config.get("holdout", 0.0))
            if held_out <= 0:
                raise ValueError(f"stage {context.stage}: {self.packed!r} holds no documents out; set its `holdout`, to 0.02 say")
        config = {
            **self.model_dump(mode="json", include=set(EvaluateSettings.model_fields)),
            "max_documents": limited(self.max_documents, context.limit),
            "max_pairs": limited(self.max_pairs, context.limit),
            "models": [{"name": name, "path": model_path(context, name)} for name in self.models],
            "documents": [context.inputs[name] for name in listed(self.input)],
            "held_out": held_out,
            "pairs": [context.inputs[name] for name in listed(self.pairs)],
            "pairs_held_out": self._pairs_share(context),
            "seed": context.seed,
            "sets": [
                scored(name, chosen, context.inputs, context.base_directory, context.limit) for name, chosen in self.sets.items()
            ],
            "trained_on": trained_on(context, self.models) if self.sets else [],
            "before": self.pairs_before(),
            "retention": self.retention,
        }
        result = run_job(context, "evaluate", config)
        context.finish(
            stats={key: value for key, value in result.items() if key != "timings"},
            files={"retention": RETENTION} if self.retention else {},
            timings=result["timings"],
        )

    def _pairs_share(self, context: StageContext) -> float:
        if self.pairs_held_out is not None:
            return self.pairs_held_out
        manifests = [shards.load_manifest(context.inputs[name]) for name in self.models if not is_external(name)]
        shares = {float(manifest.config["held_out"]) for manifest in manifests if manifest.kind == "dpo"}
        if len(shares) > 1:
            raise ValueError(
                f"stage {context.stage}: its DPO stages kept out different shares of pairs ({sorted(shares)}); set `pairs_held_out`"
            )
        return shares.pop() if shares else 0.0
