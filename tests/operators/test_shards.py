"""A shard directory is committed unit by unit, compared by bytes, and read through its removals."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from operators import shards, tables
from operators.ledger import Equation, Ledger, LedgerError, merge_stats


def documents(start: int, count: int) -> pa.Table:
    rows = range(start, start + count)
    columns = [[f"d{i}" for i in rows], [f"text {i} 文本" for i in rows], ["s"] * count, [None] * count]
    return pa.table(dict(zip(tables.DOCUMENTS.names, columns, strict=True)), schema=tables.DOCUMENTS)


def write(directory: Path, unit: int, start: int, count: int) -> dict[str, object]:
    writer = shards.UnitWriter(str(directory), unit)
    writer.write(documents(start, count))
    writer.reject(tables.rejects_table([{"id": f"r{start}", "operator": "test", "reason": "bad"}]))
    return writer.commit(Ledger(count + 1, 0, count, Counter({"test:bad": 1})), {"seen": count})


def finish(directory: Path, **options: object) -> shards.Manifest:
    return shards.finish(
        str(directory), stage="s", kind="corpus", fingerprint="f", config={}, inputs={}, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def test_rows_come_back_in_the_order_of_units_with_ordinals_that_run_on(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "s" / "f"
    write(directory, 1, 10, 5)
    write(directory, 0, 0, 10)
    manifest = finish(directory)
    assert manifest.rows == 15
    assert manifest.ledger.rejected == {"test:bad": 2}
    assert manifest.stats == {"seen": 15}
    read = [
        (ordinal, row)
        for part in shards.parts([str(directory)])
        for ordinals, batch in shards.read(part, ["id"], batch_rows=4)
        for ordinal, row in zip(ordinals.to_pylist(), batch["id"].to_pylist(), strict=True)
    ]
    assert read == [(i, f"d{i}") for i in range(15)]


def test_a_unit_written_twice_gives_the_same_names_and_is_committed_once(tmp_path: Path) -> None:
    first = write(tmp_path / "run" / "s" / "a", 0, 0, 10)
    second = write(tmp_path / "run" / "s" / "b", 0, 0, 10)
    assert first["parts"] == second["parts"]
    again = write(tmp_path / "run" / "s" / "a", 0, 0, 10)
    assert again == first


def test_a_directory_without_manifest_is_unfinished(tmp_path: Path) -> None:
    write(tmp_path / "s" / "f", 0, 0, 3)
    with pytest.raises(FileNotFoundError, match="not finished"):
        shards.parts([str(tmp_path / "s" / "f")])


def test_a_ledger_that_does_not_balance_stops_the_commit(tmp_path: Path) -> None:
    writer = shards.UnitWriter(str(tmp_path), 0)
    writer.write(documents(0, 3))
    with pytest.raises(LedgerError, match=r"in 4 .* kept 3"):
        writer.commit(Ledger(rows_in=4, kept=3))
    with pytest.raises(RuntimeError, match="keeps 2 rows, 3 were written"):
        writer.commit(Ledger(rows_in=2, kept=2))
    assert shards.committed_units(str(tmp_path)) == {}


def test_an_equation_that_does_not_balance_stops_the_finish(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="tokens does not balance"):
        finish(tmp_path / "s" / "f", equations=[Equation("tokens", {"in": 5}, {"packed": 3, "cut": 1})])


def test_a_view_reads_through_its_removals(tmp_path: Path) -> None:
    source, view = tmp_path / "run" / "s" / "f", tmp_path / "run" / "v" / "g"
    write(source, 0, 0, 20)
    finish(source)
    removed = np.zeros(20, bool)
    removed[[0, 7, 19]] = True
    name = shards.save_bitmap(str(view), 0, removed)
    path = shards.relative_to_run(str(view), shards.parts([str(source)])[0].path)
    entry = {"path": path, "rows": 20, "removed": name, "removed_rows": 3}
    manifest = finish(view, view=[entry], ledger=Ledger(20, 0, 17, Counter({"exact:duplicate": 3})))
    assert manifest.rows == 17
    (part,) = shards.parts([str(view)])
    found = [i for ordinals, _ in shards.read(part, ["id"], batch_rows=6) for i in ordinals.to_pylist()]
    assert found == [i for i in range(20) if i not in (0, 7, 19)]


def test_a_missing_column_is_named_with_the_file(tmp_path: Path) -> None:
    write(tmp_path / "s" / "f", 0, 0, 3)
    finish(tmp_path / "s" / "f")
    (part,) = shards.parts([str(tmp_path / "s" / "f")])
    with pytest.raises(KeyError, match=r"parquet has no column \['quality'\]"):
        list(shards.read(part, ["quality"]))


def test_large_units_are_cut_into_parts_of_bounded_size(tmp_path: Path) -> None:
    writer = shards.UnitWriter(str(tmp_path), 0, max_part_bytes=1 << 20)
    noise = np.random.default_rng(0)
    for i in range(6):
        text = pa.array([noise.bytes(4500).hex() for _ in range(1000)], pa.large_string())
        columns = {"id": [f"{i}-{j}" for j in range(1000)], "text": text, "source": ["s"] * 1000, "url": [None] * 1000}
        writer.write(pa.table(columns).cast(tables.DOCUMENTS))
    record = writer.commit(Ledger(rows_in=6000, kept=6000))
    assert len(record["parts"]) > 2
    assert sum(part["rows"] for part in record["parts"]) == 6000


def test_long_lists_of_a_manifest_stand_beside_it_and_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("short", "long"):
        for unit in range(5):
            write(tmp_path / folder / "s" / "f", unit, 3 * unit, 3)
    short = finish(tmp_path / "short" / "s" / "f")
    monkeypatch.setattr(shards, "_MOST_LISTED", 4)
    directory = tmp_path / "long" / "s" / "f"
    finish(directory)
    (beside,) = directory.glob("manifest.parts-*.parquet")
    long = shards.load_manifest(str(directory))
    assert list(long.parts) == short.parts and long.parts[1:3] == short.parts[1:3] and long.parts[-1] == short.parts[-1]
    assert (len(long.parts), long.rows, long.ledger) == (5, short.rows, short.ledger)
    places = [
        [part.path.partition("/s/f/")[2] for part in shards.parts([str(tmp_path / f / "s" / "f")])] for f in ("short", "long")
    ]
    assert places[0] == places[1]
    record = json.loads((directory / "manifest.json").read_bytes())
    assert list(shards.listed_beside(str(directory), record)) == [*short.parts, *short.rejects]
    beside.write_bytes(beside.read_bytes()[:-1])
    with pytest.raises(OSError, match="not the file that"):
        shards.load_manifest(str(directory))


def test_records_are_read_in_order_and_numbers_without_reading(tmp_path: Path) -> None:
    for unit in (11, 2, 100):
        write(tmp_path / "s" / "f", unit, unit, 2)
    assert [number for number, _ in shards.unit_records(str(tmp_path / "s" / "f"))] == [2, 11, 100]
    assert shards.unit_record(str(tmp_path / "s" / "f"), 11)["unit"] == 11
    (tmp_path / "s" / "f" / "units" / "00000002.json").write_text("torn")
    assert shards.committed_numbers(str(tmp_path / "s" / "f")) == {2, 11, 100}


def test_statistics_of_units_add_up() -> None:
    total: dict[str, object] = {}
    merge_stats(total, {"a": 1, "b": {"x": 2}, "e": [1]})
    merge_stats(total, {"a": 2, "b": {"x": 3, "y": 1}, "e": [2]})
    assert total == {"a": 3, "b": {"x": 5, "y": 1}, "e": [1, 2]}
