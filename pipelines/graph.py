"""From a recipe to a plan: the order of stages, and a fingerprint for each that says when its result may be reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster import storage
from operators import tables
from operators.config import SettingsError
from operators.sources.units import file_identities
from operators.stage import Stage
from pipelines.recipe import Recipe, unknown_inputs


@dataclass(frozen=True)
class Node:
    """One planned stage. `directory` is `RUN/STAGE/FINGERPRINT`."""

    name: str
    stage: Stage
    inputs: tuple[str, ...]
    fingerprint: str
    directory: str
    config: dict[str, Any]


def order(recipe: Recipe) -> list[str]:
    """Stage names so that inputs come first; among ready stages the recipe's order. Raises SettingsError on a cycle or an
    unknown input."""
    problems = unknown_inputs(recipe)
    if problems:
        raise SettingsError("\n".join(problems))
    waiting = {name: set(stage.input_names()) for name, stage in recipe.stages.items()}
    done: list[str] = []
    while waiting:
        ready = [name for name, needs in waiting.items() if needs <= set(done)]
        if not ready:
            raise SettingsError(f"stages form a cycle: {' -> '.join(_cycle(waiting))}")
        done.append(ready[0])
        del waiting[ready[0]]
    return done


def _cycle(waiting: dict[str, set[str]]) -> list[str]:
    path = [next(iter(waiting))]
    while True:
        following = next(name for name in sorted(waiting[path[-1]]) if name in waiting)
        if following in path:
            return [*path[path.index(following) :], following]
        path.append(following)


def plan(recipe: Recipe, run_directory: str, base_directory: str, limit: int | None) -> list[Node]:
    """The nodes in order. Raises SettingsError, and FileNotFoundError when an input pattern matches nothing.

    A fingerprint covers the stage's kind and version, its settings without the operational ones, the seed, the limit,
    the identity of the files it reads, and the fingerprints of its inputs. A changed setting thus redoes the stage and
    those after it, and nothing else.
    """
    nodes: dict[str, Node] = {}
    for name in order(recipe):
        stage = recipe.stages[name]
        config = stage.model_dump(mode="json")
        try:
            identities = file_identities(stage.files_at(base_directory), base_directory)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"stages.{name}: {error}") from None
        fingerprint = tables.content_hash(
            {
                "kind": stage.kind,
                "version": stage.version,
                "tables": tables.SCHEMA_VERSION,
                "config": _deciding(config, stage.operational),
                "seed": recipe.seed,
                "limit": limit,
                "files": identities,
                "inputs": [nodes[wanted].fingerprint for wanted in stage.input_names()],
            }
        )[:16]
        directory = storage.join(run_directory, name, fingerprint)
        nodes[name] = Node(name, stage, tuple(stage.input_names()), fingerprint, directory, config)
    return list(nodes.values())


def _deciding(config: dict[str, Any], operational: frozenset[str]) -> dict[str, Any]:
    """The settings without the operational ones, of which `a.b` is a setting within a setting."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        inner = frozenset(name.removeprefix(f"{key}.") for name in operational if name.startswith(f"{key}."))
        if key not in operational:
            kept[key] = _deciding(value, inner) if inner and isinstance(value, dict) else value
    return kept
