"""The recipe: one YAML file that names the stages of a run and how they hang together."""

from __future__ import annotations

import re
from typing import Any

import pydantic
import yaml
from pydantic import Field

from cluster import storage
from operators.config import Settings, SettingsError, nearest, parse
from operators.stage import Stage
from pipelines import stages

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")


class Recipe(Settings):
    """A named, seeded set of stages. Stages form a graph by naming their inputs."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str = Field(description="names the run's directory: letters, digits, `-` and `_`")
    seed: int = Field(0, ge=0, description="the seed of everything random in the run")
    description: str = ""
    stages: dict[str, pydantic.SkipValidation[Stage]] = Field(description="stage name -> its settings")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice: the first one would be lost without a word."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise SettingsError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_recipe(path: str) -> tuple[Recipe, str]:
    """The recipe of a YAML file, and its text. Raises SettingsError (all problems, one a line) or FileNotFoundError."""
    if not storage.exists(path):
        raise FileNotFoundError(f"no recipe at {path}")
    try:
        text = storage.read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8: {error}") from error
    return parse_recipe(text, path), text


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """Build a recipe from YAML text. Raises SettingsError with every problem found, one a line."""
    try:
        data = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader with a stricter mapping
    except yaml.YAMLError as error:
        raise SettingsError(f"{where} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise SettingsError(f"{where} must be a mapping with `name` and `stages`")
    raw = data.get("stages")
    if not isinstance(raw, dict) or not raw:
        raise SettingsError(f"{where}: `stages` must be a mapping of at least one stage")
    problems: list[str] = []
    built: dict[str, Stage] = {}
    for name, settings in raw.items():
        try:
            built[str(name)] = _stage(str(name), settings)
        except SettingsError as error:
            problems.append(str(error))
    recipe: Recipe | None = None
    try:
        recipe = parse(Recipe, {**data, "stages": built}, where)
        if not _NAME.match(recipe.name):
            problems.append(f"{where}.name: {recipe.name!r} must be letters, digits, '-' and '_', at most 64")
    except SettingsError as error:
        problems.insert(0, str(error))
    if problems or recipe is None:
        raise SettingsError("\n".join(problems))
    return recipe


def _stage(name: str, settings: Any) -> Stage:
    where = f"stages.{name}"
    if not _NAME.match(name):
        raise SettingsError(f"{where}: a stage's name is letters, digits, '-' and '_', at most 64")
    if not isinstance(settings, dict) or not isinstance(settings.get("kind"), str):
        raise SettingsError(f"{where}: needs `kind`; one of {', '.join(stages.STAGES)}")
    try:
        kind = stages.load(settings["kind"])
    except SettingsError as error:
        raise SettingsError(f"{where}.kind: {error}") from None
    stage = parse(kind, settings, where)
    try:
        stage.validate_deep()
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from None
    return stage


def unknown_inputs(recipe: Recipe) -> list[str]:
    """A line for each input that names no stage."""
    lines = []
    for name, stage in recipe.stages.items():
        for wanted in stage.input_names():
            if wanted not in recipe.stages:
                lines.append(f"stages.{name}: input {wanted!r} is no stage{nearest(wanted, list(recipe.stages))}")
    return lines
