"""Typed settings: pydantic models that refuse unknown keys and name the nearest valid one."""

from __future__ import annotations

import difflib
import importlib
from typing import Any, TypeVar

import pydantic

S = TypeVar("S", bound=pydantic.BaseModel)
C = TypeVar("C")


class SettingsError(ValueError):
    """A setting that is wrong: says what, where (the key's path) and what to do."""


class Settings(pydantic.BaseModel):
    """Base of every configuration model: immutable, unknown keys refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)


def nearest(name: str, valid: list[str]) -> str:
    """`; did you mean 'x'?` or the list of valid names, ready to be appended to a message."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(valid))}"


def import_class(path: str, base: type[C], what: str) -> type[C]:
    """The class at `package.module:Class`. Raises SettingsError, beginning with `what`, when it is none or no `base`."""
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"{what} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise SettingsError(f"{what} is no subclass of {base.__module__}.{base.__qualname__}")
    return found


def parse(model: type[S], values: Any, where: str) -> S:
    """Build `model` from plain YAML/JSON values.

    Raises SettingsError with one line a problem, each beginning with `where` and the key.
    """
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise SettingsError("\n".join(_explain(model, item, where) for item in error.errors())) from None


def _explain(model: type[pydantic.BaseModel], item: Any, where: str) -> str:
    path = [str(piece) for piece in item["loc"]]
    if item["type"] == "extra_forbidden":
        owner = _model_at(model, path[:-1])
        valid = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
        return f"{'.'.join([where, *path[:-1]])}: unknown key {path[-1]!r}{nearest(path[-1], valid)}"
    given = "" if item["type"] == "missing" else f" (got {str(item.get('input'))[:80]!r})"
    return f"{'.'.join([where, *path])}: {item['msg']}{given}"


def _model_at(model: type[pydantic.BaseModel], path: list[str]) -> type[pydantic.BaseModel] | None:
    """The model that owns the key below `path`, followed through fields (and the members of unions and lists)."""
    current: type[pydantic.BaseModel] | None = model
    for piece in path:
        if current is None or piece not in current.model_fields:
            continue  # an index of a list, or the tag of a union
        current = first_model(current.model_fields[piece].annotation)
    return current


def first_model(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The settings model inside a type: itself, or the first one among the arguments of a union, list or mapping."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = first_model(argument)
        if found is not None:
            return found
    return None
