"""The recipe stage that compares models."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from cluster import storage
from operators import shards
from operators.config import Settings
from operators.stage import Stage, StageContext
from pipelines.stages.training import is_external, limited, model_path, paths, run_job
from train.settings_evaluate import EvaluateSettings

_TRAINS = frozenset({"pretrain", "sft", "dpo", "kto", "reward", "grpo"})


class SetSettings(Settings):
    """A named set that models are scored on: rows of stages, or files of questions with choices."""

    input: str | list[str] | None = Field(
        default=None, description="Stages with conversations (scored on what the assistant says) or documents."
    )
    choices: str | list[str] | None = Field(
        default=None,
        description="Files in JSON Lines instead, one object a question: `question`, `choices`, `answer` (one of them, its letter "
        "or its index from 0). Scored by accuracy, the likeliest choice a byte being the reply.",
    )
    held_out: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Score the share of rows that training kept out under the same `held_out`; 0: all.",
    )
    max_rows: int = Field(default=500, ge=1, description="Rows scored at most, drawn by a hash of their id.")
    allow_overlap: bool = Field(
        default=False, description="Score rows that a model was trained on as well, which shows what it remembers, not what it can."
    )

    @model_validator(mode="after")
    def _one_source(self) -> SetSettings:
        if (self.input is None) == (self.choices is None):
            raise ValueError("give exactly one of `input` and `choices`")
        if self.choices is not None and self.held_out:
            raise ValueError("`held_out` belongs to `input`: files of choices are scored whole")
        return self


def listed(value: str | list[str] | None) -> list[str]:
    """One name, several or none as a list."""
    return [value] if isinstance(value, str) else value or []


class EvaluateStage(EvaluateSettings, Stage):
    """Compares models: held-out perplexity by language and source, preference accuracy, replies side by side."""

    version: ClassVar[int] = 3  # named sets
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
        "the matrix of scores, average forgetting and backward transfer.",
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
            "sets": [self._scored(context, name, chosen) for name, chosen in self.sets.items()],
            "trained_on": trained_on(context, self.models) if self.sets else [],
            "before": self.pairs_before(),
            "retention": self.retention,
        }
        result = run_job(context, "evaluate", config)
        context.finish(stats={key: value for key, value in result.items() if key != "timings"}, timings=result["timings"])

    def _scored(self, context: StageContext, name: str, chosen: SetSettings) -> dict[str, Any]:
        """A set as the job is told it."""
        return {
            "name": name,
            "measure": "accuracy" if chosen.choices is not None else "loss",
            "inputs": [context.inputs[stage] for stage in listed(chosen.input)],
            "choices": [context.path(path) for path in listed(chosen.choices)],
            "held_out": chosen.held_out,
            "max_rows": limited(chosen.max_rows, context.limit),
            "allow_overlap": chosen.allow_overlap,
        }

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


def trained_on(context: StageContext, models: list[str]) -> list[dict[str, Any]]:
    """What the models, and those they were made from, were trained on, by the manifests of this run: rows of
    conversations, pairs apart, and the documents of packs. Of models from outside the run nothing is known."""
    run = shards.run_directory(context.directory)
    waiting = [(name, context.inputs[name]) for name in models if not is_external(name)]
    seen: set[str] = set()
    found: dict[tuple[str, str], dict[str, Any]] = {}
    while waiting:
        stage, directory = waiting.pop()
        if directory in seen:
            continue
        seen.add(directory)
        manifest = shards.load_manifest(directory)
        inputs = {name: storage.join(run, path) for name, path in manifest.inputs.items()}
        for name, path in inputs.items():
            made = shards.load_manifest(path)
            if made.kind == "pack":
                share = float(made.config.get("holdout", 0.0))
                sources = {key: storage.join(run, inner) for key, inner in made.inputs.items()}
                rows = [(key, inner, share) for key, inner in sources.items()]
            elif "model" in made.files:
                waiting.append((name, path))
                continue
            elif manifest.kind not in _TRAINS:
                continue
            else:
                rows = [(name, path, float(manifest.config.get("held_out") or 0.0))]
            for key, source, held in rows:
                columns = shards.columns(source)
                if "id" in columns and columns & {"text", "messages"}:
                    found[stage, key] = {"stage": stage, "input": key, "directory": source, "held_out": held}
    return [found[key] for key in sorted(found)]
