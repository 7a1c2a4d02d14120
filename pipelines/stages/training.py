"""Recipe stages that make a model. They run as jobs of one warm group of training workers (`train.session`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field

from operators.stage import Cancelled, Stage, StageContext
from operators.synthesis.packaged import PREFIX
from train.errors import JobCancelled, TrainingError
from train.settings import ModelShape, OptimizerSettings, PretrainSettings, Share
from train.settings_finetune import FinetuneSettings, SftSettings

Mixed = str | dict[str, float | Share]
"""One input, or inputs with their shares of a mixture."""


def is_external(model: str) -> bool:
    """True when a `model` setting names no stage: a path or URI (it holds a `/`), or `packaged:NAME`."""
    return "/" in model or model.startswith(PREFIX)


def paths(models: Iterable[str]) -> list[str]:
    """The paths and URIs among `model` settings, whose content decides a fingerprint."""
    return [model for model in models if is_external(model) and not model.startswith(PREFIX)]


def model_path(context: StageContext, model: str) -> str:
    """The directory of a model that a stage made or that lies outside the run. Raises SettingsError when the stage made none."""
    if model.startswith(PREFIX):
        return model  # every machine converts it for itself
    return context.path(model) if is_external(model) else context.model_of(model)


def shares(value: Mixed) -> dict[str, Share]:
    """The inputs of a mixture, the order kept."""
    written = {value: 1.0} if isinstance(value, str) else value
    return {name: share if isinstance(share, Share) else Share(weight=share) for name, share in written.items()}


def run_job(context: StageContext, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Hand a job to the run's training workers and wait for its result. Raises Cancelled, TrainingError."""
    group = context.services["train"]()

    def progress(done: int, total: int, note: str, metrics: dict[str, Any]) -> None:
        shown = [note, f"loss {metrics['loss']:.3f}"] if "loss" in metrics else [note]
        if "tokens_per_second" in metrics:
            shown.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in metrics:
            shown.append(f"MFU {metrics['mfu']:.1%}")
        context.progress(done, total, ", ".join(shown))

    try:
        return dict(group.run({"kind": kind, "config": config, "directory": context.directory}, progress, context.cancelled.is_set))
    except JobCancelled as error:
        raise Cancelled(f"stage {context.stage}: {error}") from None
    except TrainingError as error:
        context.log(error.details)
        raise


def limited(steps: int, limit: int | None) -> int:
    """The steps of a trial run."""
    return steps if limit is None else min(steps, limit)


class TrainingStage(OptimizerSettings, Stage):
    """Base of stages that train a model on a mixture of inputs.

    A subclass names its settings (`told`): these, with the inputs, the model and the seed, are the job of kind `kind`.
    """

    operational: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "track"})
    resource: ClassVar[str] = "train"
    told: ClassVar[type[OptimizerSettings]]

    input: Mixed
    model: ModelShape | str

    def input_names(self) -> list[str]:
        return [*shares(self.input), *([self.model] if isinstance(self.model, str) and not is_external(self.model) else [])]

    def files(self) -> list[str]:
        return paths([self.model]) if isinstance(self.model, str) else []

    def job(self, context: StageContext) -> dict[str, Any]:
        """The job's configuration."""
        return {
            **self.model_dump(mode="json", include=set(self.told.model_fields)),
            "inputs": [
                {"name": name, "directory": context.inputs[name], **share.model_dump()}
                for name, share in shares(self.input).items()
            ],
            "model": model_path(context, self.model) if isinstance(self.model, str) else self.model.model_dump(mode="json"),
            "seed": context.seed,
        }

    def run(self, context: StageContext) -> None:
        kind = str(getattr(self, "kind"))  # noqa: B009  each subclass declares its own literal
        result = run_job(context, kind, self.job(context))
        files = {"model": "model", "tokenizer": "model/tokenizer.json"}
        if getattr(self, "lora", None) is not None:
            files["adapter"] = "adapter"
        context.finish(
            stats={key: value for key, value in result.items() if key != "timings"}, files=files, timings=result["timings"]
        )


class PretrainStage(PretrainSettings, TrainingStage):
    """Trains a decoder-only model on packed sequences, from scratch or from a checkpoint (continued pretraining)."""

    told: ClassVar[type[OptimizerSettings]] = PretrainSettings

    kind: Literal["pretrain"] = "pretrain"
    input: Mixed = Field(description="A pack stage, or pack stages with their shares of tokens.")
    model: ModelShape | str = Field(
        default=ModelShape(),
        description="A shape to start from scratch; or a stage that made a model, a path (with a `/`), or `packaged:NAME`.",
    )

    def job(self, context: StageContext) -> dict[str, Any]:
        return {**super().job(context), "steps": limited(self.steps, context.limit)}


class FinetuneStage(FinetuneSettings, TrainingStage):
    """Base of stages that train a model on examples."""

    operational: ClassVar[frozenset[str]] = TrainingStage.operational | {
        "micro_batch_examples", "sharding", "activation_checkpointing",
    }  # fmt: skip

    model: str = Field(description="The stage that made the model to start from, a path (with a `/`), or `packaged:NAME`.")

    def job(self, context: StageContext) -> dict[str, Any]:
        return {**super().job(context), "most_steps": context.limit}


class SftStage(SftSettings, FinetuneStage):
    """Fine-tunes a model on conversations: loss on what the assistant says, inputs mixed by weight, LoRA if wanted."""

    told: ClassVar[type[OptimizerSettings]] = SftSettings

    kind: Literal["sft"] = "sft"
    input: Mixed = Field(description="A stage with conversations, or stages with their shares of the mixture.")
