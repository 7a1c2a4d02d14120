"""Shapes of models as small YAML files: those that come along, by name, and one's own. Importing this module loads no framework."""

from __future__ import annotations

from pathlib import Path

import yaml

from cluster import storage
from operators.config import parse
from train.settings import NAMED_SHAPE, ModelShape

SHAPES = Path(__file__).parent / "shapes"
"""Shapes that come along, each a YAML file named by its size."""


def read_shape(path: str) -> ModelShape:
    """The shape in a small YAML file (a local path or URI), or one of those that come along, by name: `0.1b`, `1b`, ...

    The name may have `shape:` before it, as a recipe's `model` does, and is no file then. Raises FileNotFoundError that lists
    the names, ValueError for what is no YAML, or operators.config.SettingsError that names the file and the key.
    """
    name = path.removeprefix(NAMED_SHAPE)
    named = SHAPES / f"{name}.yaml"
    place = str(named) if named.is_file() else path
    if (name != path and not named.is_file()) or not storage.exists(place):
        names = ", ".join(sorted(file.stem for file in SHAPES.glob("*.yaml")))
        raise FileNotFoundError(f"no shape at {path}: neither a file nor one of {names}")
    try:
        values = yaml.safe_load(storage.read_bytes(place))
    except yaml.YAMLError as error:
        raise ValueError(f"{place} is no YAML: {error}") from None
    return parse(ModelShape, values, place)
