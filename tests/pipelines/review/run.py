"""A finished run with rows to review: conversations from documents, and preference pairs, in two languages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from operators import shards, tables
from operators.ledger import Ledger
from operators.synthesis.rows import INSTRUCTIONS

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>\u202e\x00\u2028<!--"
_SPANS = [
    ("source_id", pa.string()), ("span_start", pa.int64()), ("span_end", pa.int64()), ("span_text", pa.large_string()),
    ("key_points", pa.list_(pa.string())),
]  # fmt: skip
DOCUMENTED = pa.schema([*INSTRUCTIONS, *(pa.field(name, kind) for name, kind in _SPANS)])
_TEXTS = {
    "en": (
        "How often should the filter be rinsed, and why?",
        "Rinse it every two weeks: dust that settles there lowers the flow of air.",
        "The filter should be rinsed every two weeks. Dust that settles on it lowers the flow of air.",
    ),
    "zh": (
        "滤网应多久冲洗一次？为什么？",
        "每两周冲洗一次：积在滤网上的灰尘会降低风量。",
        "滤网应每两周冲洗一次。积在滤网上的灰尘会降低风量并增加能耗。",
    ),
}


def provenance(method: str, model: str) -> dict[str, Any]:
    return {"generator": model, "operation": method, "parents": []}


def conversation(number: int) -> dict[str, Any]:
    """Every tenth row by another method, every third in Chinese; every seventh from two turns; row 4 is hostile."""
    lang = "zh" if number % 3 == 0 else "en"
    asked, said, span = _TEXTS[lang]
    if number == 4:
        asked, said, span = HOSTILE, HOSTILE, HOSTILE
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{said} ({number})"}]
    if number % 7 == 0:
        messages += [{"role": "user", "content": "thanks"}, {"role": "assistant", "content": "You are welcome."}]
    source = {"source_id": f"manual-{number % 5}.pdf", "span_start": 1200 + number, "span_end": 1300 + number, "span_text": span}
    method = "documents:dialogue" if number % 10 == 0 else "documents:pairs"
    return {
        "id": f"row-{number:04d}", "messages": messages, "lang": lang, **source, "key_points": [span[:24]],
        "provenance": provenance(method, "teacher-7b"),
    }  # fmt: skip


def pair(number: int) -> dict[str, Any]:
    lang = "zh" if number % 3 == 0 else "en"
    asked, said, _ = _TEXTS[lang]
    worse = {"en": "It depends.", "zh": "看情况。"}[lang]
    prompt = [{"role": "system", "content": "Answer from the manual."}, {"role": "user", "content": asked}]
    sides = {"chosen": said, "rejected": f"{worse} ({number})"}
    replies = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    row = {"id": f"pair-{number:04d}", "prompt": prompt, **replies, "margin": 0.5, "lang": lang}
    return {**row, "provenance": provenance("preference", "teacher-7b")}


def write_stage(run: Path, name: str, rows: list[dict[str, Any]], schema: pa.Schema, part_rows: int = 150) -> str:
    """A finished stage of several parts; its directory."""
    directory = str(run / name / "f00d")
    for unit, start in enumerate(range(0, len(rows), part_rows)):
        table = pa.Table.from_pylist(rows[start : start + part_rows], schema=schema)
        writer = shards.UnitWriter(directory, unit)
        writer.write(table)
        writer.commit(Ledger(rows_in=table.num_rows, kept=table.num_rows))
    shards.finish(directory, stage=name, kind="conversations", fingerprint="f00d", config={}, inputs={})
    return directory


def make_run(root: Path, rows: int = 400) -> Path:
    """`root/run` with the finished stages `chat` and `pairs`."""
    run = root / "run"
    write_stage(run, "chat", [conversation(number) for number in range(rows)], DOCUMENTED)
    write_stage(run, "pairs", [pair(number) for number in range(rows // 2)], tables.PREFERENCES)
    stages = {
        name: {"kind": "conversations", "directory": f"{name}/f00d", "inputs": [], "status": "done", "seconds": 1}
        for name in ("chat", "pairs")
    }
    (run / "run.json").write_text(json.dumps({"recipe": "run", "order": list(stages), "stages": stages}), "utf-8")
    return run
