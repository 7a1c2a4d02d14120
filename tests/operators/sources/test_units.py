"""The plan: which files, which units, which keys."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.sources import ReadSettings, Unit, file_identities, plan_units, read_unit
from tests.operators.sources.reading import read_all


def fill(folder: Path, names: list[str], rows: int = 3) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"{name} {row}"}) + "\n" for row in range(rows)), "utf-8")


def test_directories_globs_and_lists_in_a_fixed_order(tmp_path: Path) -> None:
    fill(tmp_path, ["data/b.jsonl", "data/a.jsonl", "data/sub/c.jsonl", "data/.hidden.jsonl", "data/_tmp.jsonl"])
    (tmp_path / "data" / "README").write_text("no data")
    assert [unit.relative for unit in plan_units(ReadSettings(path="data"), str(tmp_path))] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert [unit.relative for unit in plan_units(ReadSettings(path="data/*.jsonl"), str(tmp_path))] == ["a.jsonl", "b.jsonl"]
    assert [unit.relative for unit in plan_units(ReadSettings(path="data/**/*.jsonl"), str(tmp_path))][-1] == "sub/c.jsonl"
    listed = plan_units(ReadSettings(path=["data/b.jsonl", "data/*.jsonl", "./data/b.jsonl"]), str(tmp_path))
    assert [unit.relative for unit in listed] == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize("pattern", ["nothing/*.jsonl", "absent.jsonl", "empty"])
def test_a_pattern_without_match_is_named(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=pattern.replace("*", r"\*")):
        plan_units(ReadSettings(path=pattern), str(tmp_path))


def test_files_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    fill(tmp_path, ["x/part.jsonl", "y/part.jsonl"])
    read = read_all(["x/part.jsonl", "y/part.jsonl"], tmp_path)
    assert [unit.relative for unit in read.units] == ["x/part.jsonl", "y/part.jsonl"]
    assert len(set(read.ids)) == 6


def test_the_source_is_the_top_folder_or_the_stem(tmp_path: Path) -> None:
    fill(tmp_path, ["data/wiki/a.jsonl", "data/books.v2.jsonl"], rows=1)
    assert [row["source"] for row in read_all("data", tmp_path).rows] == ["books", "wiki"]


def test_ids_do_not_depend_on_where_the_input_lies(tmp_path: Path) -> None:
    fill(tmp_path / "here", ["data/a.jsonl"])
    fill(tmp_path / "there" / "deep", ["data/a.jsonl"])
    assert read_all("data", tmp_path / "here").ids == read_all(tmp_path / "there" / "deep" / "data").ids


def test_units_survive_json_and_are_numbered_in_order(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jsonl", "b.jsonl"], rows=40)
    (tmp_path / "c.html").write_text("<p>x</p>")
    units = plan_units(ReadSettings(path="*", max_unit_bytes=300), str(tmp_path))
    assert [unit.index for unit in units] == list(range(len(units)))
    assert len(units) > 5
    assert [Unit.from_json(json.loads(json.dumps(unit.to_json()))) for unit in units] == units


def test_keys_change_with_content_and_range_and_with_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jsonl", "b.jsonl"], rows=40)
    read = ReadSettings(path="*.jsonl", max_unit_bytes=300)
    before = plan_units(read, str(tmp_path))
    (tmp_path / "a.jsonl").touch()
    assert plan_units(read, str(tmp_path)) == before
    text = (tmp_path / "b.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text(text.replace("39", "93"))
    after = plan_units(read, str(tmp_path))
    changed = {unit.relative for unit, old in zip(after, before, strict=True) if unit.key != old.key}
    assert changed == {"b.jsonl"}
    assert len({unit.key for unit in after}) == len(after)
    assert [item["relative"] for item in file_identities(["*.jsonl"], str(tmp_path))] == ["a.jsonl", "b.jsonl"]


def test_the_identity_of_a_folder_is_that_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"w")
    before = file_identities("model", str(tmp_path))
    assert [item["relative"] for item in before] == ["weights.safetensors"]
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"v")
    assert file_identities("model", str(tmp_path)) != before


def test_a_large_file_is_known_by_samples_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operators.sources.units.HASHED_FILE_BYTES", 1000)
    path = tmp_path / "large.jsonl"
    path.write_bytes(b"x" * 300_000)
    first, time = file_identities("large.jsonl", str(tmp_path))[0], path.stat().st_mtime_ns
    for place in (0, 150_000, 299_999):
        data = bytearray(b"x" * 300_000)
        data[place] = ord("y")
        path.write_bytes(data)
        os.utime(path, ns=(time, time))
        assert file_identities("large.jsonl", str(tmp_path))[0] != first
    path.write_bytes(b"x" * 300_000)
    os.utime(path, ns=(time, time))
    assert file_identities("large.jsonl", str(tmp_path))[0] == first


@pytest.mark.parametrize("limit", [1, 3, 4, 7, 100])
def test_a_limit_counts_rows_over_all_files_bad_ones_included(tmp_path: Path, limit: int) -> None:
    fill(tmp_path, ["a.jsonl", "b.jsonl"])
    (tmp_path / "c.jsonl").write_bytes(b"broken\n" * 5)
    read = read_all("*.jsonl", tmp_path, limit=limit, max_unit_bytes=50)
    assert len(read.rows) + len(read.bad) == min(limit, 11)
    whole = read_all("*.jsonl", tmp_path)
    assert read.rows == whole.rows[: len(read.rows)]


def test_pages_in_files_share_units_and_keep_their_own_ids(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.html").write_text(f"<p>页面 {number}</p>", "utf-8")
    (tmp_path / "z.xhtml").write_text("<p/>")
    read = read_all(tmp_path, max_unit_bytes=120)
    whole = read_all(tmp_path)
    assert len(whole.units) == 1
    assert len(read.units) > 3
    assert read.rows == whole.rows
    assert whole.rows[3]["content"].decode() == "<p>页面 3</p>"
    assert [whole.rows[row]["content_type"] for row in (0, 30)] == ["text/html", "application/xhtml+xml"]
    assert len(set(whole.ids)) == 31


def test_an_address_with_a_scheme_reads_like_a_path(tmp_path: Path) -> None:
    fill(tmp_path, ["data/a.jsonl", "data/b.jsonl"])
    by_path = read_all("data", tmp_path)
    assert read_all(f"file://{tmp_path}/data").rows == by_path.rows
    assert read_all(f"file://{tmp_path}/data/*.jsonl").rows == by_path.rows
    assert len(read_all([f"file://{tmp_path}/data/a.jsonl", f"{tmp_path}/data/a.jsonl"]).units) == 1


@pytest.mark.parametrize("name", ["pages.warc.gz", "documents.parquet", "notes.jsonl"])
def test_a_unit_read_in_two_halves_or_around_rows_is_the_same_unit(example_data: Path, name: str) -> None:
    read = ReadSettings(path=name)
    unit = plan_units(read, str(example_data))[0]

    def rows(**options: Any) -> dict[int, str]:
        batches = list(read_unit(unit, read, **options))
        found = {row: id_ for batch in batches for row, id_ in zip(batch.rows.tolist(), batch.table["id"].to_pylist(), strict=True)}
        return found | {bad.row: bad.id for batch in batches for bad in batch.bad}

    whole = rows()
    middle = len(whole) // 2
    assert rows(stop_row=middle) | rows(start_row=middle, batch_rows=100) == whole
    skipped = frozenset({0, 40, 297, middle})
    assert rows(skip_rows=skipped) == {row: id_ for row, id_ in whole.items() if row not in skipped}
    assert rows(start_row=len(whole)) == {}


def test_formats_may_be_mixed_and_each_unit_has_one_schema(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jsonl"])
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("line\n")
    read = ReadSettings(path=".")
    for unit in plan_units(read, str(tmp_path)):
        schemas = {batch.table.schema for batch in read_unit(unit, read, batch_rows=1)}
        assert [schema.names for schema in schemas] == [["id", "text", "source", "url"]]
    assert {row["source"] for row in read_all(".", tmp_path).rows} == {"a", "b", "c"}


def test_a_whole_file_that_comes_goes_or_changes_touches_the_unit_it_is_in_and_few_others(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"page-{number:05d}.md").write_text(f"# {number}\n中文 and English", encoding="utf-8")
    read = ReadSettings(path=str(tmp_path))
    before = plan_units(read, "/")
    assert 15 < len(before) < 60 and sum(len(unit.files) for unit in before) == 3000
    (tmp_path / "page-00100-new.md").write_text("new", encoding="utf-8")
    (tmp_path / "page-01500.md").write_text("changed", encoding="utf-8")
    (tmp_path / "page-02500.md").unlink()
    after = plan_units(read, "/")
    assert sum(len(unit.files) for unit in after) == 3000
    new = [unit for unit in after if unit.key not in {unit.key for unit in before}]
    assert 3 <= len(new) <= 6
    together = [relative for unit in after for _, relative in unit.files]
    assert together == sorted(together)
