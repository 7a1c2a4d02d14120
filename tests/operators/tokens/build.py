"""Small stages to run the token stages on: finished shard directories and contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from operators import shards
from operators.ledger import Ledger
from operators.shards import UnitWriter
from operators.stage import StageContext


def corpus(run: Path, name: str, rows: list[dict[str, Any]], part_rows: list[int], columns: tuple[str, ...] = ()) -> str:
    """A finished stage of the given rows, in parts of the given numbers of rows (the last of them repeats)."""
    directory = str(run / name / "f0")
    fields = [("id", pa.string()), ("text", pa.large_string()), ("source", pa.string()), ("lang", pa.string())]
    schema = pa.schema([field for field in fields if not columns or field[0] in columns])
    position, unit = 0, 0
    while position < len(rows):
        count = part_rows[min(unit, len(part_rows) - 1)]
        piece = [{name: row.get(name) for name in schema.names} for row in rows[position : position + count]]
        writer = UnitWriter(directory, unit)
        writer.write(pa.Table.from_pylist(piece, schema))
        writer.commit(Ledger(rows_in=len(piece), kept=len(piece)))
        position, unit = position + count, unit + 1
    shards.finish(directory, stage=name, kind="corpus", fingerprint="f0", config={}, inputs={})
    return directory


def context(run: Path, stage: str, inputs: dict[str, str], *, workers: int = 2, seed: int = 17, tag: str = "f1") -> StageContext:
    directory = run / stage / tag
    return StageContext(stage, stage, str(directory), tag, {}, inputs, seed, workers=workers)


def bilingual(count: int) -> list[dict[str, Any]]:
    """Documents of many lengths in English and Chinese, some empty, some longer than several sequences."""
    english = "The furnace turns raw ore into metal, and the smith's patience turns metal into a blade. It's 1,024 degrees!\n"
    chinese = "丹炉把矿石炼成金属，工匠的耐心把金属打成刀剑。使用Python语言，温度是1024度！\n"
    rows = []
    for number in range(count):
        text = (chinese if number % 2 else english) * (number * 7 % 23 + (60 if number % 41 == 0 else 0))
        text = "" if number % 29 == 3 else f"{number} {text}\x00😀" if number % 5 == 0 else f"{text}{number}"
        rows.append({"id": f"doc-{number:04d}", "text": text, "source": f"s{number % 3}", "lang": "zh" if number % 2 else "en"})
    return rows
