"""The linter: reads a recipe against known causes of bad models. Warnings, never errors."""

from __future__ import annotations

from typing import Any

from operators.stage import Stage
from pipelines.recipe import Recipe
from pipelines.stages.training import shares

#: Above these learning rates continued training of a pretrained model has been seen to forget (full weights; LoRA).
_FULL_LEARNING_RATE, _LORA_LEARNING_RATE = 5e-5, 1e-3
_LEAST_REHEARSAL = 0.05


def lint(recipe: Recipe) -> list[str]:
    """One line for each doubt, beginning with the stage it is about."""
    warnings: list[str] = []
    for name, stage in recipe.stages.items():
        where = f"stages.{name}"
        if stage.kind in ("sft", "dpo"):
            warnings += [f"{where}: {text}" for text in _fine_tune(stage)]
        if stage.kind == "corpus":
            warnings += [f"{where}: {text}" for text in _corpus(stage)]
        if stage.kind == "pack":
            warnings += [f"{where}: {text}" for text in _pack(stage)]
        if stage.resource == "generate":
            warnings += [f"{where}: {text}" for text in _generating(stage)]
    warnings += _chain(recipe)
    return warnings


def _fine_tune(stage: Stage) -> list[str]:
    found = []
    mixture = getattr(stage, "input", None)
    if stage.kind == "sft":
        if not isinstance(mixture, dict) or len(mixture) < 2:
            found.append("trains on one source: mix in a share of general data (rehearsal), or the model forgets what it knew")
        elif min(weights := [share.weight for share in shares(mixture).values()]) / sum(weights) < _LEAST_REHEARSAL:
            found.append(f"the smallest share of the mixture is below {_LEAST_REHEARSAL:.0%}: too little to rehearse with")
    rate = getattr(stage, "learning_rate", None)
    lora: Any = getattr(stage, "lora", None)
    bound = _LORA_LEARNING_RATE if lora else _FULL_LEARNING_RATE
    if stage.kind == "sft" and rate is not None and rate > bound:
        found.append(f"learning rate {rate:g} is above {bound:g}, where {'LoRA' if lora else 'full'} fine-tuning tends to forget")
    return found


def _corpus(stage: Stage) -> list[str]:
    names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in getattr(stage, "operators", [])]
    found = []
    filters = [name for name in names if name.startswith("gopher") or name == "score_quality"]
    if filters and "detect_language" not in names:
        found.append(f"{filters[0]} has thresholds for each language, but no detect_language stands before it")
    elif filters and names.index("detect_language") > names.index(filters[0]):
        found.append(f"detect_language stands after {filters[0]}, which chooses its thresholds by language")
    return found


def _pack(stage: Stage) -> list[str]:
    if not getattr(stage, "holdout", 0):
        return ["holds out no documents: perplexity would be measured on text the model was trained on"]
    return []


def _generating(stage: Stage) -> list[str]:
    endpoint: Any = getattr(getattr(stage, "generator", None), "endpoint", None)
    if endpoint is not None and getattr(stage, "max_generated_tokens", None) is None:
        return ["asks a server without `max_generated_tokens`: a mistake in the recipe would be paid for in full"]
    return []


def _uncurated(recipe: Recipe, name: str) -> bool:
    """True when rows that a model wrote reach a stage with no `curate` stage between."""
    stage = recipe.stages[name]
    if stage.kind == "curate":
        return False
    models: list[str] = getattr(stage, "model_stages", list)()
    return stage.resource == "generate" or any(
        _uncurated(recipe, wanted)
        for wanted in stage.input_names()
        if wanted in recipe.stages and wanted not in models and recipe.stages[wanted].resource != "train"
    )


def _chain(recipe: Recipe) -> list[str]:
    found = []
    kinds = {stage.kind for stage in recipe.stages.values()}
    tuned = {name for name, stage in recipe.stages.items() if stage.kind in ("sft", "dpo")}
    measured = {name for stage in recipe.stages.values() if stage.kind == "evaluate" for name in getattr(stage, "models", [])}
    for name in sorted(tuned - measured):
        found.append(f"stages.{name}: no evaluate stage measures it, so what it forgot stays unknown")
    for name, stage in recipe.stages.items():
        if stage.kind == "sft" and any(
            _uncurated(recipe, wanted) for wanted in stage.input_names() if recipe.stages[wanted].resource != "train"
        ):
            found.append(f"stages.{name}: trains on rows that a model wrote and no `curate` stage has looked at")
    if "pack" in kinds and "dedup" not in kinds:
        found.append("no dedup stage: repeated documents cost steps and are memorised")
    return found
