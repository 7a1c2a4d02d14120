"""Recipe stages that make a model. They run as jobs of one warm group of training workers (`train.session`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cluster import storage
from operators import shards
from operators.config import SettingsError
from operators.stage import Cancelled, Stage, StageContext
from operators.synthesis.packaged import PREFIX
from pipelines.stages.sets import (
    CompareSettings,
    SetSettings,
    automatic,
    bounded,
    given,
    inherited,
    listed,
    lost_too_much,
    rows_kept_out,
    scored,
    sentence,
    trained_on,
)
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
        context.measured(metrics, done)

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

    operational: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "track", "evaluate.most_lost", "evaluate.override"})
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
                {"name": name, "directory": context.inputs[name], **share.told()} for name, share in shares(self.input).items()
            ],
            "model": model_path(context, self.model) if isinstance(self.model, str) else self.model.model_dump(mode="json"),
            "seed": context.seed,
        }

    def run(self, context: StageContext) -> None:
        kind = str(getattr(self, "kind"))  # noqa: B009  each subclass declares its own literal
        result = run_job(context, kind, self.job(context))
        self.tell(context, result)
        files = {"model": "model", "tokenizer": "model/tokenizer.json"}
        if getattr(self, "lora", None) is not None:
            files["adapter"] = "adapter"
        context.finish(
            stats={key: value for key, value in result.items() if key != "timings"}, files=files, timings=result["timings"]
        )

    def tell(self, context: StageContext, result: dict[str, Any]) -> None:
        """What is worth a line once training has ended."""


class ComparedStage(TrainingStage):
    """Base of training stages that score their model on general and domain sets before the first step and after the last.

    What is scored by default is never trained on: rows are held out of the inputs for it (see pipelines.stages.sets).
    """

    evaluate: CompareSettings | None = Field(
        default=CompareSettings(),
        description="What the model is scored on before and after, and how much general ability may be lost; `false`: nothing.",
    )

    @field_validator("evaluate", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        return {} if value is True else None if value is False else value

    def input_names(self) -> list[str]:
        named = [name for _, _, chosen in self._asked() for name in listed(chosen.input)]
        return list(dict.fromkeys([*super().input_names(), *named]))

    def files(self) -> list[str]:
        return [*super().files(), *(path for _, _, chosen in self._asked() for path in listed(chosen.choices))]

    def _asked(self) -> list[tuple[str, str, SetSettings]]:
        return self.evaluate.sets if self.evaluate is not None else []

    def refusal(self, directory: str) -> str | None:
        return lost_too_much(self.evaluate, directory)

    def goes_on(self) -> bool:
        """False for a model from scratch, which has nothing to lose."""
        return isinstance(self.model, str) and not is_shape(self.model)

    def kept_out(self, context: StageContext, name: str) -> float:
        """The share of an input's rows that is held out for an automatic set of the domain or of general ability."""
        raise NotImplementedError

    def is_general(self, context: StageContext, name: str) -> bool:
        """True for an input that is rehearsed."""
        return bool(shares(self.input)[name].general)

    def job(self, context: StageContext) -> dict[str, Any]:
        job = super().job(context)
        sets = self._sets(context)
        if not sets:
            return job
        held = self._held_out(context, sets)
        for item in job["inputs"]:
            item["held_out"] = held[item["name"]]
        run = shards.run_directory(context.directory)
        share = float(getattr(self, "held_out", 0.0))
        own = [
            row
            for name in shares(self.input)
            for row in given(context.stage, name, context.inputs[name], max(share, held[name]), run)
        ]
        before = trained_on(context, [str(self.model)])
        # Rows that an earlier stage held out for its general set it may have elsewhere word for word, and left out there.
        measured = {chosen["source"]["inherited"] for chosen in sets if "inherited" in chosen["source"]}
        own += [row for row in before if row["stage"] in measured]
        earlier = before if any(not chosen["automatic"] for chosen in sets) else []
        cache = storage.join(context.cache_directory, "evaluations") if context.cache_directory else None
        bound = self.evaluate is not None and self.evaluate.most_lost is not None
        return {**job, "comparison": {"sets": sets, "own": own, "earlier": earlier, "cache": cache, "bounded": bound}}

    def _sets(self, context: StageContext) -> list[dict[str, Any]]:
        """The sets as the job is told them. Raises SettingsError for a bound without a set of general ability."""
        told = self.evaluate
        if told is None or not self.goes_on():
            return []
        found: list[dict[str, Any]] = []
        for role, name, chosen in told.sets:
            named = scored(name, chosen, context.inputs, context.base_directory, context.limit)
            found.append({**named, "role": role, "automatic": False, "source": {}})
        run = shards.run_directory(context.directory)
        for role, asked in (("domain", told.domain), ("general", told.general)):
            names = [name for name in shares(self.input) if self.is_general(context, name) == (role == "general")]
            if asked is not None:
                continue
            made = [automatic(role, name, context.inputs[name], self.kept_out(context, name), run) for name in names]
            found += [chosen for chosen in made if chosen is not None]
            if role == "general" and not names:
                found += inherited(context, str(self.model))
        names = [chosen["name"] for chosen in found]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SettingsError(
                f"stage {context.stage}: two sets are called {twice[0]!r} (held-out rows of an input are called as it is); give "
                "the one under `evaluate` another name"
            )
        if told.most_lost is not None and not any(chosen["role"] == "general" for chosen in found):
            raise SettingsError(
                f"stage {context.stage}: evaluate.most_lost bounds what general ability may be lost, and there is no set to "
                "measure it on: name one under evaluate.general, or mark an input {weight: 0.1, general: true}"
            )
        return bounded(found, context.limit)

    def _held_out(self, context: StageContext, sets: list[dict[str, Any]]) -> dict[str, float]:
        """For each input the largest share of its rows that a set scores."""
        held = dict.fromkeys(shares(self.input), 0.0)
        for name in held:
            for chosen in sets:
                if context.inputs[name] in chosen["inputs"] and not chosen.get("allow_overlap"):
                    held[name] = max(held[name], chosen["held_out"] if chosen["held_out"] < 1 else 0.0)
        return held

    def tell(self, context: StageContext, result: dict[str, Any]) -> None:
        if self.evaluate is None or not self.goes_on():
            return
        found = result.setdefault("evaluation", {"sets": [], "empty": []})
        for row in found["sets"]:
            context.log(sentence(row))
        for role in ("general", "domain"):
            if not any(row["role"] == role for row in found["sets"]):
                context.log(f"{role} set: none was scored before and after (docs/evaluation.md says what would be)")


class PretrainStage(PretrainSettings, ComparedStage):
    """Trains a decoder-only model on packed sequences, from scratch or from a checkpoint (continued pretraining)."""

    told: ClassVar[type[OptimizerSettings]] = PretrainSettings
    version: ClassVar[int] = 4  # scores before and after
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

    @model_validator(mode="after")
    def _compared_with_something(self) -> PretrainStage:
        if not self.goes_on() and self.evaluate is not None and self.evaluate != CompareSettings():
            raise ValueError("`evaluate` compares with the model before, and a model from scratch has none; use an evaluate stage")
        return self

    def kept_out(self, context: StageContext, name: str) -> float:
        return 0.0  # what is held out of a pack its own `holdout` says

    def _held_out(self, context: StageContext, sets: list[dict[str, Any]]) -> dict[str, float]:
        return dict.fromkeys(shares(self.input), 0.0)

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


class TunedStage(FinetuneStage, ComparedStage):
    """Base of stages that train a model to speak, scored before and after."""

    def kept_out(self, context: StageContext, name: str) -> float:
        told = float(getattr(self, "held_out", 0.0))
        return told or rows_kept_out(sum(part.kept_rows for part in shards.parts([context.inputs[name]])))


class SftStage(SftSettings, TunedStage):
    """Fine-tunes a model on conversations: loss on what the assistant says, inputs mixed by weight, LoRA if wanted."""

    told: ClassVar[type[OptimizerSettings]] = SftSettings
    version: ClassVar[int] = 3  # rows are held out, and scored before and after

    kind: Literal["sft"] = "sft"
    input: Mixed = Field(
        description="A stage with conversations or documents, or stages with their shares of the mixture. Documents are rehearsed "
        "as in pretraining: loss on all tokens, no chat template."
    )

    def is_general(self, context: StageContext, name: str) -> bool:
        told = shares(self.input)[name].general
        columns = shards.columns(context.inputs[name])
        return told if told is not None else "text" in columns and "messages" not in columns
