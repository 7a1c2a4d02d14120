"""`--set workers.gpu.max=8`: a path through the settings and a value; wrong paths are told with the nearest valid one."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import pydantic
import yaml

from cluster.manifests.settings import ManifestError, Settings

M = TypeVar("M", bound=pydantic.BaseModel)


def with_overrides(assignments: Sequence[str], defaults: Settings | None = None) -> Settings:
    """The default settings with `PATH=VALUE` applied in turn.

    Text settings take the value as it stands, others read it as YAML: `workers.cpu.spot=true`, `redis=null`,
    `head.node_selector.disk=fast`. A group that there is not is added whole: `workers.big={kinds: [train], gpus: 8}`;
    `workers.gpu=null` takes one away.

    Raises ManifestError with one line a problem, each beginning with the path.
    """
    values = (defaults or Settings()).model_dump(mode="json")
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ManifestError(f"--set {assignment}: write it as PATH=VALUE, e.g. workers.gpu.max=8")
        _assign(Settings, values, path.split("."), text, path)
    try:
        return Settings.model_validate(values)
    except pydantic.ValidationError as error:
        raise ManifestError("\n".join(_explain(item) for item in error.errors())) from None


def _assign(model: type[pydantic.BaseModel], values: dict[str, Any], path: list[str], text: str, whole: str) -> None:
    """Set the value at `path` below `values`, which are those of `model`."""
    key, rest = path[0], path[1:]
    if key not in model.model_fields:
        before = whole[: len(whole) - len(".".join(path))].rstrip(".")
        raise ManifestError(
            f"--set {whole}: {before or 'manifest'} has no setting {key!r}{_nearest(key, list(model.model_fields))}"
        )
    annotation = model.model_fields[key].annotation
    mapped = _mapped(annotation)
    if not rest:
        values[key] = _value(annotation, text, whole)
    elif mapped is not None:
        name, below = _entry(mapped, rest, values[key], whole)
        if not below:
            value = _value(mapped, text, whole)
            if value is None:
                if name not in values[key]:
                    raise ManifestError(f"--set {whole}: there is no {name!r}{_nearest(name, list(values[key]))}")
                del values[key][name]
            else:
                values[key][name] = value
        else:
            inner = _model(mapped)
            assert inner is not None
            _assign(inner, values[key][name], below, text, whole)
    else:
        inner = _model(annotation)
        if inner is None:
            raise ManifestError(f"--set {whole}: {key} is a single value, so nothing stands below it")
        if values[key] is None:
            values[key] = {}
        _assign(inner, values[key], rest, text, whole)


def _entry(mapped: Any, rest: list[str], present: dict[str, Any], whole: str) -> tuple[str, list[str]]:
    """The name in a mapping and what of the path goes on below it. Names of plain values may hold dots (node labels)."""
    inner = _model(mapped)
    if inner is None or len(rest) == 1:
        return ".".join(rest), []
    if rest[0] not in present:
        raise ManifestError(
            f"--set {whole}: there is no {rest[0]!r}{_nearest(rest[0], list(present))}; "
            f"a new one is set whole, {whole[: whole.index(rest[0])]}{rest[0]}={{...}}"
        )
    return rest[0], rest[1:]


def _value(annotation: Any, text: str, whole: str) -> Any:
    """Text as a setting of this type takes it."""
    if _textual(annotation):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ManifestError(f"--set {whole}: {text!r} is no YAML value: {str(error).splitlines()[0]}") from None
    inner = _model(annotation)
    if inner is not None and _mapped(annotation) is None and isinstance(value, dict):
        for key in value:
            if key not in inner.model_fields:
                raise ManifestError(f"--set {whole}: no setting {key!r}{_nearest(str(key), list(inner.model_fields))}")
    return value


def _textual(annotation: Any) -> bool:
    """True for text, choices of text, and models that are written as text (a secret's key)."""
    if annotation is str:
        return True
    return typing.get_origin(annotation) is Literal


def _mapped(annotation: Any) -> Any:
    """The type of a mapping's values, None for what is no mapping."""
    return typing.get_args(annotation)[1] if typing.get_origin(annotation) is dict else None


def _model(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The model that a type is, perhaps beside None."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            found = _model(member)
            if found is not None:
                return found
    return None


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(valid))}"


def _explain(item: Any) -> str:
    path = ".".join(str(piece) for piece in item["loc"]) or "manifest"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = item.get("input")
    # the value of an environment variable is not repeated: it may be the secret that does not belong there
    plain = isinstance(given, str | int | float | bool) and not path.startswith(("env", "credentials"))
    return f"{path}: {message}{f' (got {str(given)[:80]!r})' if plain else ''}"
