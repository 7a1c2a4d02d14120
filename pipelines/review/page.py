"""The files of a sample: a page that needs nothing but itself, and the same rows as JSON Lines.

Neither says by which method a row was made, or which reply of a pair was chosen: a reviewer should not know. The rows are
data inside the page, never markup; a content security policy that knows the page's own style and script by their hashes
forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cluster import storage
from pipelines.report import excerpts
from pipelines.review.sample import Item, Sample, by_ordinal
from pipelines.review.verdicts import verdicts_of
from pipelines.review.words import WORDS, say

_HERE = Path(__file__).parent
_REPORT = _HERE.parent / "report"
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'"
MAX_CHARACTERS = 20_000  # of one text on the page; the JSON Lines hold all of it
PAGE, LINES = "review.html", "review.jsonl"

_KEYS = {
    "accept": "A", "reject": "R", "left": "1", "right": "2", "tie": "3", "neither": "4", "skip": "S",
}  # fmt: skip
_LABELS = {"left": "left_better", "right": "right_better"}


def write(stage_directory: str, sample: Sample, out: str) -> tuple[str, str]:
    """Write `review.html` and `review.jsonl` into a folder; their paths."""
    rows = by_ordinal(stage_directory, sample)
    shown = [_content(number, item, rows[item.row], sample) for number, item in enumerate(sample.items)]
    page, lines = storage.join(out, PAGE), storage.join(out, LINES)
    storage.write_bytes(page, render(sample, shown).encode("utf-8"))
    data = "".join(
        json.dumps({**entry, "verdict": None, "note": "", "reviewer": None}, ensure_ascii=False) + "\n" for entry in shown
    )
    storage.write_bytes(lines, data.encode("utf-8", "surrogatepass"))
    return page, lines


def _content(number: int, item: Item, row: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
    """What reviewers see of a row: its messages, or prompt and two replies; and the source that it was made from."""
    found: dict[str, Any] = {"sample": sample.name, "item": number, "id": item.id, "lang": row.get("lang")}
    if sample.table == "preferences":
        first, second = ("rejected", "chosen") if item.swapped else ("chosen", "rejected")
        found |= {"prompt": _messages(row["prompt"]), "left": _messages(row[first]), "right": _messages(row[second])}
    elif sample.table == "documents":
        found["messages"] = [{"role": "document", "content": row.get("text") or ""}]
    else:
        found["messages"] = _messages(row["messages"])
    if row.get("tools"):
        found["tools"] = row["tools"]
    span = {name: row[name] for name in ("source_id", "span_start", "span_end", "span_text") if row.get(name) is not None}
    if span:
        found["span"] = span
    if row.get("key_points"):
        found["key_points"] = list(row["key_points"])
    return found


def _messages(given: Any) -> list[dict[str, str]]:
    return [{"role": str(item.get("role") or ""), "content": str(item.get("content") or "")} for item in given or []]


def render(sample: Sample, shown: list[dict[str, Any]]) -> str:
    """The page as text."""
    css = "\n".join((folder / name).read_text("utf-8") for folder, name in ((_REPORT, "report.css"), (_HERE, "review.css")))
    script = (_HERE / "review.js").read_text("utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    verdicts = verdicts_of(sample.table)
    data = {
        "sample": sample.name,
        "stage": sample.stage,
        "pairs": sample.table == "preferences",
        "keys": {_KEYS[verdict].lower(): verdict for verdict in verdicts},
        "words": {name: list(forms) for name, forms in WORDS.items()},
        "items": [_legible(entry) for entry in shown],
    }
    return environment.get_template("page.jinja").render(
        say=say,
        words=WORDS,
        stage=excerpts.visible(sample.stage),
        sample=sample.name,
        count=len(shown),
        pairs=sample.table == "preferences",
        verdicts=[(verdict, _LABELS.get(verdict, verdict), _KEYS[verdict]) for verdict in verdicts],
        policy=f"{_POLICY}; style-src 'sha256-{_hash(css)}'; script-src 'sha256-{_hash(script)}'",
        css=Markup(css),
        script=Markup(script),
        data=Markup(as_data(data)),
    )


def as_data(value: Any) -> str:
    """JSON that may stand inside a script element of type application/json: nothing in it ends the element or begins a comment."""
    written = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return written


def _legible(entry: dict[str, Any]) -> dict[str, Any]:
    """Texts clipped, invisible characters spelled out; `more` counts what is left out."""
    found: dict[str, Any] = {"item": entry["item"], "id": entry["id"], "shown": excerpts.visible(entry["id"])}
    found["lang"] = entry["lang"] if excerpts.language_attribute(entry["lang"]) else None
    for name in ("messages", "prompt", "left", "right"):
        if name in entry:
            found[name] = [{"role": excerpts.visible(m["role"]), **_text(m["content"])} for m in entry[name]]
    if "span" in entry:
        span = entry["span"]
        place = "" if "span_start" not in span or "span_end" not in span else f"{span['span_start']:,} – {span['span_end']:,}"
        found["span"] = {
            "source": excerpts.visible(str(span.get("source_id") or "")),
            "place": place,
            **_text(span.get("span_text") or ""),
        }
    if "key_points" in entry:
        found["points"] = [_text(str(point)) for point in entry["key_points"]]
    if "tools" in entry:
        found["tools"] = _text(str(entry["tools"]))
    return found


def _text(content: str) -> dict[str, Any]:
    more = len(content) - MAX_CHARACTERS
    return {"text": excerpts.visible(content[:MAX_CHARACTERS]), **({"more": more} if more > 0 else {})}


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
