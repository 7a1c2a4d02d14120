"""Recipe stages that align a model with preferences, and the one that writes a model with its adapters merged in."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from cluster import storage
from operators import shards
from operators.config import SettingsError
from operators.stage import Stage, StageContext
from pipelines.stages.training import Mixed, TunedStage, is_external, model_path, paths, run_job
from train.settings import OptimizerSettings
from train.settings_finetune import DpoSettings, KtoSettings, MergeSettings


class DpoStage(DpoSettings, TunedStage):
    """Aligns a model with preference pairs (DPO and its kin), against the model it starts from.

    What that model says of the pairs is computed once and kept for every run that asks for the same.
    """

    version: ClassVar[int] = 3  # scores before and after
    told: ClassVar[type[OptimizerSettings]] = DpoSettings

    kind: Literal["dpo"] = "dpo"
    input: Mixed = Field(description="A stage with preference pairs, or stages with their shares of the mixture.")

    def job(self, context: StageContext) -> dict[str, Any]:
        return {**super().job(context), "reference_cache": reference_cache(context)}


class KtoStage(KtoSettings, TunedStage):
    """Aligns a model with single replies that are marked good or bad (KTO), against the model it starts from."""

    version: ClassVar[int] = 2  # rows are held out, and scored before and after
    told: ClassVar[type[OptimizerSettings]] = KtoSettings

    kind: Literal["kto"] = "kto"
    input: Mixed = Field(description="A stage with labelled conversations (`format: kto`), or stages with their shares.")

    def job(self, context: StageContext) -> dict[str, Any]:
        return {**super().job(context), "reference_cache": reference_cache(context)}


def reference_cache(context: StageContext) -> str | None:
    """Where log-probabilities of reference models are kept for all runs."""
    return storage.join(context.cache_directory, "reference") if context.cache_directory else None


class MergeStage(MergeSettings, Stage):
    """Writes a model with PEFT adapters merged into its unquantised weights, in the layout that transformers and vLLM load.

    Sums are made in float32 and cast once, at the end; tokenizer, chat template and generation settings come along.
    """

    resource: ClassVar[str] = "train"
    operational: ClassVar[frozenset[str]] = frozenset({"max_shard_size"})

    kind: Literal["merge"] = "merge"
    model: str = Field(description="The base: a stage that made a model, or a path (with a `/`).")
    adapter: str | list[str] = Field(
        description="A stage that trained adapters, or the path of a PEFT adapter (with a `/`); or several, merged in this order."
    )

    @property
    def adapters(self) -> list[str]:
        return [self.adapter] if isinstance(self.adapter, str) else self.adapter

    def input_names(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.model, *self.adapters) if not is_external(name)))

    def files(self) -> list[str]:
        return paths((self.model, *self.adapters))

    def run(self, context: StageContext) -> None:
        config = {
            **self.model_dump(mode="json", include=set(MergeSettings.model_fields)),
            "model": model_path(context, self.model),
            "adapters": [adapter_path(context, name) for name in self.adapters],
        }
        result = run_job(context, "merge", config)
        context.finish(
            stats={key: value for key, value in result.items() if key != "timings"},
            files={"model": "model", "tokenizer": "model/tokenizer.json"},
            timings=result["timings"],
        )


def adapter_path(context: StageContext, name: str) -> str:
    """The directory of an adapter that a stage trained or that lies outside the run. Raises SettingsError for a stage without."""
    if is_external(name):
        return context.path(name)
    directory = context.inputs[name]
    files = shards.load_manifest(directory).files
    if "adapter" not in files:
        raise SettingsError(f"stage {context.stage}: stage {name!r} trains no adapter (it makes {sorted(files)}); set its `lora`")
    return shards.output(directory, files["adapter"])
