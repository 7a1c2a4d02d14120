"""Recipe stages that train and evaluate. They run as jobs of one warm group of training workers (`train.session`)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from cluster import storage
from operators import shards
from operators.stage import Cancelled, Stage, StageContext
from train.errors import JobCancelled, TrainingError
from train.settings import DpoSettings, EvaluateSettings, ModelShape, PretrainSettings, SftSettings


def is_path(model: str) -> bool:
    """True when a `model` setting is a path or URI rather than a stage: it holds a `/`."""
    return "/" in model


def model_path(context: StageContext, model: str) -> str:
    """The directory of a model that a stage made or that lies outside the run.

    Raises ValueError when the stage made no model.
    """
    if is_path(model):
        return context.path(model)
    files = shards.load_manifest(context.inputs[model]).files
    if "model" not in files:
        raise ValueError(f"stage {context.stage}: stage {model!r} made no model; it made {sorted(files)}")
    return storage.join(context.inputs[model], files["model"])


def _weights(value: str | list[str] | dict[str, float]) -> dict[str, float]:
    if isinstance(value, dict):
        return value
    return dict.fromkeys([value] if isinstance(value, str) else value, 1.0)


def _inputs(context: StageContext, weights: dict[str, float]) -> list[dict[str, Any]]:
    return [{"name": name, "directory": context.inputs[name], "weight": weight} for name, weight in weights.items()]


def run_job(context: StageContext, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Hand a job to the run's training workers and wait for its result. Raises Cancelled, TrainingError."""
    group = context.services["train"]()

    def progress(done: int, total: int, note: str, metrics: dict[str, Any]) -> None:
        shown = f"{note}, loss {metrics['loss']:.3f}" if "loss" in metrics else note
        context.progress(done, total, shown)

    try:
        return dict(group.run({"kind": kind, "config": config, "directory": context.directory}, progress, context.cancelled.is_set))
    except JobCancelled as error:
        raise Cancelled(f"stage {context.stage}: {error}") from None
    except TrainingError as error:
        context.log(error.details)
        raise


def _finish_training(context: StageContext, result: dict[str, Any], adapter: bool) -> None:
    stats = {key: value for key, value in result.items() if key != "timings"}
    files = {"model": "model", "tokenizer": "model/tokenizer.json", **({"adapter": "adapter"} if adapter else {})}
    context.finish(stats=stats, files=files, timings=result["timings"])


def _limited(steps: int, limit: int | None) -> int:
    return steps if limit is None else min(steps, limit)


class PretrainStage(PretrainSettings, Stage):
    """Trains a decoder-only model on packed sequences, from scratch or from a checkpoint (continued pretraining)."""

    operational: ClassVar[frozenset[str]] = frozenset({"checkpoint_every"})
    resource: ClassVar[str] = "train"

    kind: Literal["pretrain"] = "pretrain"
    input: str | dict[str, float] = Field(description="A pack stage, or pack stages with their shares of tokens.")
    model: ModelShape | str = Field(
        default=ModelShape(), description="A shape to start from scratch; or a stage that made a model, or a path (with a `/`)."
    )

    def input_names(self) -> list[str]:
        return [*_weights(self.input), *([self.model] if isinstance(self.model, str) and not is_path(self.model) else [])]

    def files(self) -> list[str]:
        return [self.model] if isinstance(self.model, str) and is_path(self.model) else []

    def run(self, context: StageContext) -> None:
        config = {
            **self.model_dump(mode="json", include=set(PretrainSettings.model_fields)),
            "steps": _limited(self.steps, context.limit),
            "inputs": _inputs(context, _weights(self.input)),
            "model": model_path(context, self.model) if isinstance(self.model, str) else self.model.model_dump(mode="json"),
            "seed": context.seed,
        }
        _finish_training(context, run_job(context, "pretrain", config), adapter=False)


class SftStage(SftSettings, Stage):
    """Fine-tunes a model on conversations: loss on what the assistant says, inputs mixed by weight, LoRA if wanted."""

    operational: ClassVar[frozenset[str]] = frozenset({"checkpoint_every"})
    resource: ClassVar[str] = "train"

    kind: Literal["sft"] = "sft"
    model: str = Field(description="The stage that made the model to start from, or a path (with a `/`).")
    input: str | dict[str, float] = Field(description="A stage with conversations, or stages with their shares of the mixture.")

    def input_names(self) -> list[str]:
        return [*_weights(self.input), *([] if is_path(self.model) else [self.model])]

    def files(self) -> list[str]:
        return [self.model] if is_path(self.model) else []

    def run(self, context: StageContext) -> None:
        config = {
            **self.model_dump(mode="json", include=set(SftSettings.model_fields)),
            "steps": _limited(self.steps, context.limit),
            "inputs": _inputs(context, _weights(self.input)),
            "model": model_path(context, self.model),
            "seed": context.seed,
        }
        _finish_training(context, run_job(context, "sft", config), adapter=self.lora is not None)


class DpoStage(DpoSettings, Stage):
    """Aligns a model with preference pairs by DPO, against the model it starts from."""

    operational: ClassVar[frozenset[str]] = frozenset({"checkpoint_every"})
    resource: ClassVar[str] = "train"

    kind: Literal["dpo"] = "dpo"
    model: str = Field(description="The stage that made the model to start from, or a path (with a `/`).")
    input: str | dict[str, float] = Field(description="A stage with preference pairs, or stages with their shares of the mixture.")

    def input_names(self) -> list[str]:
        return [*_weights(self.input), *([] if is_path(self.model) else [self.model])]

    def files(self) -> list[str]:
        return [self.model] if is_path(self.model) else []

    def run(self, context: StageContext) -> None:
        config = {
            **self.model_dump(mode="json", include=set(DpoSettings.model_fields)),
            "steps": _limited(self.steps, context.limit),
            "inputs": _inputs(context, _weights(self.input)),
            "model": model_path(context, self.model),
            "seed": context.seed,
        }
        _finish_training(context, run_job(context, "dpo", config), adapter=self.lora is not None)


class EvaluateStage(EvaluateSettings, Stage):
    """Compares models: held-out perplexity by language and source, preference accuracy, replies side by side."""

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

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateStage:
        if len(set(self.models)) != len(self.models):
            raise ValueError("`models` names one twice")
        if self.reference is not None and self.reference not in self.models:
            raise ValueError(f"`reference` {self.reference!r} is not one of `models`")
        if self.input is not None and self.packed is None:
            raise ValueError("`input` needs `packed`: only documents that were kept out of packing can be scored")
        if self.packed is not None and self.input is None:
            raise ValueError("`packed` needs `input`: the stages whose documents it packed")
        return self

    def input_names(self) -> list[str]:
        names = [*(name for name in self.models if not is_path(name)), *_weights(self.pairs or [])]
        names += [*([self.packed] if self.packed else []), *_weights(self.input or [])]
        return list(dict.fromkeys(names))

    def files(self) -> list[str]:
        return [name for name in self.models if is_path(name)]

    def run(self, context: StageContext) -> None:
        held_out = 0.0
        if self.packed is not None:
            held_out = float(shards.load_manifest(context.inputs[self.packed]).config.get("holdout", 0.0))
            if held_out <= 0:
                raise ValueError(f"stage {context.stage}: {self.packed!r} holds no documents out; set its `holdout`, to 0.02 say")
        config = {
            **self.model_dump(mode="json", include=set(EvaluateSettings.model_fields)),
            "max_documents": _limited(self.max_documents, context.limit),
            "max_pairs": _limited(self.max_pairs, context.limit),
            "models": [{"name": name, "path": model_path(context, name)} for name in self.models],
            "documents": [context.inputs[name] for name in _weights(self.input or [])],
            "held_out": held_out,
            "pairs": [context.inputs[name] for name in _weights(self.pairs or [])],
            "pairs_held_out": self._pairs_share(context),
            "seed": context.seed,
        }
        result = run_job(context, "evaluate", config)
        context.finish(stats={key: value for key, value in result.items() if key != "timings"}, timings=result["timings"])

    def _pairs_share(self, context: StageContext) -> float:
        if self.pairs_held_out is not None:
            return self.pairs_held_out
        manifests = [shards.load_manifest(context.inputs[name]) for name in self.models if not is_path(name)]
        shares = {float(manifest.config["held_out"]) for manifest in manifests if manifest.kind == "dpo"}
        if len(shares) > 1:
            raise ValueError(
                f"stage {context.stage}: its DPO stages kept out different shares of pairs ({sorted(shares)}); set `pairs_held_out`"
            )
        return shares.pop() if shares else 0.0
