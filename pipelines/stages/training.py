"""Recipe stages that make a model. They run as jobs of one warm group of training workers (`train.session`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from cluster import storage
from operators import shards
from operators.config import SettingsError
from operators.stage import Cancelled, Stage, StageContext
from operators.synthesis.packaged import PREFIX
from train.errors import JobCancelled, TrainingError
from train.model_shapes import read_shape
from train.settings import NAMED_SHAPE, EwcTerm, ModelShape, OptimizerSettings, PretrainSettings, Share, is_shape
from train.settings_finetune import FinetuneSettings, SftSettings

Mixed = str | dict[str, float | Share]
"""One input, or inputs with their shares of a mixture."""


def is_external(model: str) -> bool:
    """True when a `model` setting names no stage: a path or URI (it holds a `/`), `packaged:NAME`, or the file of a shape."""
    return "/" in model or model.startswith(PREFIX) or is_shape(model)


def paths(models: Iterable[str]) -> list[str]:
    """The paths and URIs among `model` settings, whose content decides a fingerprint."""
    return [model for model in models if is_external(model) and not model.startswith(PREFIX)]


def model_path(context: StageContext, model: str) -> str:
    """The directory of a model that a stage made or that lies outside the run. Raises SettingsError when the stage made none."""
    if model.startswith(PREFIX):
        return model  # every machine converts it for itself
    return context.path(model) if is_external(model) else context.model_of(model)


def fisher_path(context: StageContext, fisher: str) -> str:
    """The directory of a Fisher diagonal that a stage made or that lies outside the run. Raises SettingsError."""
    if is_external(fisher):
        return context.path(fisher)
    directory = context.inputs[fisher]
    files = shards.load_manifest(directory).files
    if "fisher" not in files:
        raise SettingsError(f"stage {context.stage}: ewc: stage {fisher!r} is no `fisher` stage (it makes {sorted(files)})")
    return storage.join(directory, files["fisher"])


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

    def penalties(self) -> list[EwcTerm]:
        """Those on moving away from models, of a kind that has any."""
        return list(getattr(self, "ewc", []))

    def input_names(self) -> list[str]:
        made = [*([self.model] if isinstance(self.model, str) else []), *(term.fisher for term in self.penalties())]
        return list(dict.fromkeys([*shares(self.input), *(name for name in made if not is_external(name))]))

    def files(self) -> list[str]:
        return paths([*([self.model] if isinstance(self.model, str) else []), *(term.fisher for term in self.penalties())])

    def job(self, context: StageContext) -> dict[str, Any]:
        """The job's configuration."""
        terms = [{**term.model_dump(), "fisher": fisher_path(context, term.fisher)} for term in self.penalties()]
        return {
            **self.model_dump(mode="json", include=set(self.told.model_fields)),
            **({"ewc": terms} if terms else {}),
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
    version: ClassVar[int] = 3  # rows of the embedding beyond the model's tokenizer are set where the corpus' one has more tokens
    operational: ClassVar[frozenset[str]] = TrainingStage.operational | {
        "parallel", "activation_checkpointing", "compile", "micro_batch_sequences", "loss_chunk_tokens", "keep_checkpoints",
    }  # fmt: skip

    kind: Literal["pretrain"] = "pretrain"
    input: Mixed = Field(description="A pack stage, or pack stages with their shares of tokens.")
    model: ModelShape | str = Field(
        default=ModelShape(),
        description="A shape to start from scratch, `shape:NAME` for one that comes along or its YAML file; or a stage that made a "
        "model, a path (with a `/`), or `packaged:NAME`. The corpus may be packed with an extension of that model's tokenizer.",
    )

    @field_validator("model", mode="before")
    @classmethod
    def _named_shape(cls, model: object) -> object:
        # Read here, so that the fingerprint holds the numbers and not the name.
        try:
            return read_shape(model) if isinstance(model, str) and model.startswith(NAMED_SHAPE) else model
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None

    def job(self, context: StageContext) -> dict[str, Any]:
        job = {**super().job(context), "most_steps": context.limit}
        if is_shape(self.model):
            job["model"] = read_shape(context.path(str(self.model))).model_dump(mode="json")
        return job


class FinetuneStage(FinetuneSettings, TrainingStage):
    """Base of stages that train a model on examples."""

    operational: ClassVar[frozenset[str]] = TrainingStage.operational | {
        "micro_batch_examples", "sharding", "activation_checkpointing",
    }  # fmt: skip

    model: str = Field(description="The stage that made the model to start from, a path (with a `/`), or `packaged:NAME`.")

    def job(self, context: StageContext) -> dict[str, Any]:
        job = {**super().job(context), "most_steps": context.limit}
        if self.chat_template is not None and paths([self.chat_template]):
            job["chat_template"] = context.path(self.chat_template)
        return job

    def files(self) -> list[str]:
        return [*super().files(), *paths([self.chat_template] if self.chat_template is not None else [])]


class SftStage(SftSettings, FinetuneStage):
    """Fine-tunes a model on conversations: loss on what the assistant says, inputs mixed by weight, LoRA if wanted."""

    told: ClassVar[type[OptimizerSettings]] = SftSettings
    version: ClassVar[int] = 2  # a tokenizer's own chat template is kept

    kind: Literal["sft"] = "sft"
    input: Mixed = Field(
        description="A stage with conversations or documents, or stages with their shares of the mixture. Documents are rehearsed "
        "as in pretraining: loss on all tokens, no chat template."
    )
