"""Replies as JSON: what a schema asks for, or a reason why it is not there.

Engines that hold a model to a schema (`Request.json_schema`) still cut replies at `max_tokens`, and servers may ignore
the schema, so every reply is parsed and validated here. Models like to wrap JSON in a Markdown fence or a sentence; the
first value that parses is taken.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
import orjson

from operators.config import SettingsError
from operators.synthesis.requests import Reject, Reply

_SHOWN = 300  # characters of a message about a reply that does not fit
_MOST_STARTS = 16  # places at which a value is looked for: a reply full of braces costs no more than this many attempts


def schema_text(schema: dict[str, Any], where: str = "schema") -> str:
    """Canonical JSON of a schema, for `Request.json_schema`. Raises SettingsError when it is no valid JSON schema."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise SettingsError(
            f"{where}: no valid JSON schema: {error.message} at {'/'.join(map(str, error.absolute_path)) or '/'}"
        ) from error
    return json.dumps(schema, sort_keys=True, ensure_ascii=False)


def parse_json(reply: Reply, schema: str | None = None) -> Any | Reject:
    """The JSON value of a reply.

    Rejects: `truncated` (cut before its end and not parseable), `empty`, `malformed` (no JSON, or none that fits the
    schema; the detail says what and where).
    """
    text = reply.text.strip()
    if not text:
        return Reject("truncated" if reply.truncated else "empty")
    found, value = _first_value(text)
    if not found:
        return Reject("truncated" if reply.truncated else "malformed", detail="no JSON value in the reply")
    if schema is not None:
        error = jsonschema.exceptions.best_match(_validator(schema).iter_errors(value))
        if error is not None:
            place = "/".join(map(str, error.absolute_path)) or "/"
            return Reject("malformed", detail=f"at {place}: {error.message}"[:_SHOWN])
    return value


@functools.lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    return jsonschema.Draft202012Validator(json.loads(schema))


def _first_value(text: str) -> tuple[bool, Any]:
    """(whether there is one, value): the whole text, else the first object or array that stands in it."""
    try:
        return True, orjson.loads(text.encode("utf-8", "replace"))
    except orjson.JSONDecodeError:
        pass
    decoder = json.JSONDecoder()
    start = -1
    for _ in range(_MOST_STARTS):
        places = [place for place in (text.find("{", start + 1), text.find("[", start + 1)) if place >= 0]
        if not places:
            break
        start = min(places)
        try:
            return True, decoder.raw_decode(text, start)[0]
        except (json.JSONDecodeError, RecursionError):
            continue
    return False, None
