"""What `danlu ops` prints: operators and stages described from their own settings models."""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any

import pydantic
from pydantic_core import PydanticUndefined

from operators import registry
from operators.config import SettingsError, first_model, nearest
from pipelines import stages


def list_all() -> list[str]:
    """One line for each stage kind and each operator."""
    lines = ["Stages (kind):"]
    lines += [f"  {kind:<20} {_first_line(stages.load(kind))}" for kind in stages.STAGES]
    lines += ["", "Operators (in the `operators` of a corpus stage, or of a curate stage for conversations):"]
    lines += [f"  {name:<20} {_first_line(registry.load(name))}" for name in registry.OPERATORS]
    lines += ["", "`danlu ops show NAME` tells every setting. Your own: an import path `package.module:Class`."]
    return lines


def describe_one(name: str) -> list[str]:
    """An operator or stage with its documentation and settings. Raises SettingsError for an unknown name."""
    if name in stages.STAGES:
        stage = stages.load(name)
        return [f"stage {name}", *_documentation(stage), *_settings(stage, skip={"kind"})]
    if name in registry.OPERATORS or ":" in name:
        operator = registry.load(name)
        columns = [f"  needs columns: {', '.join(operator.needs) or '-'}", f"  adds columns:  {', '.join(operator.adds) or '-'}"]
        return [f"operator {name}", *_documentation(operator), "", *columns, *_settings(operator.settings)]
    raise SettingsError(f"unknown operator or stage {name!r}{nearest(name, [*stages.STAGES, *registry.OPERATORS])}")


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]


def _documentation(thing: Any) -> list[str]:
    return ["", *(f"  {line}".rstrip() for line in (inspect.getdoc(thing) or "").split("\n"))]


def settings_lines(model: type[pydantic.BaseModel]) -> list[str]:
    """Every setting of a model with its type, default and meaning, those of models within it indented below."""
    return _settings(model)


def _settings(model: type[pydantic.BaseModel], skip: set[str] = frozenset(), indent: str = "  ") -> list[str]:  # type: ignore[assignment]
    lines = ["", f"{indent}settings:"] if model.model_fields else ["", f"{indent}no settings"]
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        default = "required" if field.is_required() else f"default {_default(field)}"
        lines.append(f"{indent}  {name}: {_type(field.annotation)} ({default})")
        if field.description:
            lines.append(f"{indent}      {field.description}")
        nested = first_model(field.annotation)
        if nested is not None:
            lines += _settings(nested, indent=indent + "      ")[1:]
    return lines


def _default(field: Any) -> str:
    if field.default_factory is not None:
        value = field.default_factory()
    else:
        value = field.default
    if value is PydanticUndefined:
        return "-"
    return "the settings below" if isinstance(value, pydantic.BaseModel) else repr(value)[:100]


def _type(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    named = re.sub(r"<class '([^']+)'>", r"\1", str(annotation))
    # module names go, but not inside quoted values such as 'jsonl.zst'
    return re.sub(r"(?<!['\w.])(?:[a-z_]+\.)+(?=[A-Za-z])", "", named).replace("NoneType", "None")
