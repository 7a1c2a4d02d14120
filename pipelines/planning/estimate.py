"""From a recipe to plain estimates: a walk over its stages in order, rows, bytes and tokens handed from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cluster import storage
from cluster.plan import Estimate
from cluster.rates import Rates
from operators import shards
from operators.stage import Stage
from pipelines.graph import Node, order
from pipelines.graph import plan as plan_graph
from pipelines.planning import data_stages, model_stages
from pipelines.planning.flow import Flow, Notes, Walk, flow_of_finished
from pipelines.recipe import Recipe

Estimator = Callable[[str, Any, Walk], tuple[Estimate, Flow]]

_ESTIMATORS: dict[str, Estimator] = {
    "corpus": data_stages.corpus,
    "dedup": data_stages.dedup,
    "line_dedup": data_stages.cutting,
    "substring_dedup": data_stages.cutting,
    "semantic_dedup": data_stages.encoder,
    "score": data_stages.encoder,
    "select": data_stages.choosing,
    "mix": data_stages.choosing,
    "export": data_stages.export,
    "tokenizer": data_stages.tokenizer,
    "extend_tokenizer": data_stages.tokenizer,
    "pack": data_stages.pack,
    "conversations": data_stages.files,
    "rankings": data_stages.files,
    "quality_classifier": data_stages.files,
    "curate": data_stages.curate,
    "reviewed": data_stages.curate,
    "generate": model_stages.generated,
    "self_instruct": model_stages.generated,
    "evol_instruct": model_stages.generated,
    "responses": model_stages.generated,
    "document_instruct": model_stages.generated,
    "preferences": model_stages.generated,
    "pretrain": model_stages.trained,
    "sft": model_stages.trained,
    "dpo": model_stages.trained,
    "kto": model_stages.trained,
    "reward": model_stages.trained,
    "grpo": model_stages.trained,
    "fisher": model_stages.measured,
    "merge": model_stages.measured,
    "evaluate": model_stages.measured,
    "promote": model_stages.promoted,
}


def estimates(recipe: Recipe, runs: str, base_directory: str, rates: Rates, limit: int | None = None) -> list[Estimate]:
    """One estimate a stage, inputs first. Finished stages of the run are taken as they are; for the others the newest results
    of the same stage (with other settings, or of a trial run) give the ratios, and what nothing tells is assumed and said.

    Raises SettingsError for a recipe that cannot be planned; files that are missing make stages unknown, not an error.
    """
    directory = storage.join(runs, recipe.name if limit is None else f"{recipe.name}-limit-{limit}")
    walk = Walk(recipe, rates, base_directory, limit, _nodes(recipe, directory, base_directory, limit), _earlier(runs, recipe.name))
    for name in order(recipe):
        stage = recipe.stages[name]
        walk.notes = Notes()
        estimate, flow = _finished(name, stage, walk) or _estimate(name, stage, walk)
        noted = tuple(walk.notes.assumed.items()) if estimate.unknown is None else ()
        walk.estimates.append(
            replace(estimate, assumed=(*estimate.assumed, *noted), measured=(*estimate.measured, *walk.notes.measured.items()))
        )
        walk.flows[name] = flow
    return walk.estimates


def _estimate(name: str, stage: Stage, walk: Walk) -> tuple[Estimate, Flow]:
    estimator = _ESTIMATORS.get(stage.kind)
    if estimator is None:
        return data_stages.no_input(name, stage, Flow(), f"kind: {stage.kind}")
    return estimator(name, stage, walk)


def _finished(name: str, stage: Stage, walk: Walk) -> tuple[Estimate, Flow] | None:
    """A stage that has run with these very settings: its own numbers."""
    directory = walk.finished(name)
    if directory is None:
        return None
    manifest = shards.load_manifest(directory)
    flow = flow_of_finished(directory, [walk.flows[each] for each in stage.input_names() if walk.flows[each].known])
    guessed = _estimate(name, stage, walk)[1]
    walk.notes = Notes()
    flow = replace(
        flow, model=guessed.model, vocab=flow.vocab or guessed.vocab, native=guessed.native,
        stored=flow.stored or guessed.stored,
    )  # fmt: skip
    seconds = shards.load_timings(directory).get("wall_seconds")
    estimate = data_stages.base(
        name, stage, None, rows_out=flow.rows, tokens=flow.tokens, done=True,
        seconds_taken=float(seconds) if seconds is not None else None,
        written_bytes=float(sum(part["bytes"] for part in [*manifest.parts, *manifest.rejects])),
    )  # fmt: skip
    return replace(estimate, rows_in=float(manifest.ledger.rows_in + manifest.ledger.created)), flow


def _nodes(recipe: Recipe, directory: str, base_directory: str, limit: int | None) -> dict[str, Node]:
    """The stages with their fingerprints, if there is a run that could hold finished ones: finding them reads all input files
    of up to 64 MiB. Nothing where an input file is missing, because then no fingerprint can be told."""
    if not storage.list_directories(directory):
        return {}
    try:
        return {node.name: node for node in plan_graph(recipe, directory, base_directory, limit)}
    except FileNotFoundError:
        return {}


def _earlier(runs: str, name: str) -> tuple[str, ...]:
    """Runs of the recipe, also trials with a limit."""
    found = [each for each in storage.list_directories(runs) if _named(each, name)]
    return tuple(sorted(found, key=lambda path: path.rstrip("/").rpartition("/")[2] != name))


def _named(path: str, name: str) -> bool:
    own = path.rstrip("/").rpartition("/")[2]
    return own == name or (own.startswith(f"{name}-limit-") and own.removeprefix(f"{name}-limit-").isdigit())
