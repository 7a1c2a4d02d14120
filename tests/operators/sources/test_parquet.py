"""Parquet: row groups as units, damage inside and around them."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.config import SettingsError
from operators.sources import ReadSettings, plan_units
from tests.operators.sources.reading import read_all


def write(path: Path, table: dict[str, object] | pa.Table, rows_a_group: int = 100, **options: object) -> Path:
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, row_group_size=rows_a_group, **options)
    return path


def texts(count: int) -> list[str]:
    return [f"文档 {number} " + "text " * (number % 50) for number in range(count)]


def test_text_id_source_address_and_carried_columns_keep_their_types(tmp_path: Path) -> None:
    columns = {"id": [1, 2], "text": ["甲", "b"], "source": ["wiki", ""], "url": [None, "u"], "tags": [["x"], []]}
    write(tmp_path / "a.parquet", {**columns, "score": pa.array([1, 2], pa.int8())})
    read = read_all("a.parquet", tmp_path, columns=["score", "tags"])
    assert read.rows == [
        {"id": "1", "text": "甲", "source": "wiki", "url": None, "score": 1, "tags": ["x"]},
        {"id": "2", "text": "b", "source": "a", "url": "u", "score": 2, "tags": []},
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_every_string_like_column_can_be_the_text(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "a.parquet", {"text": pa.array(["甲", "b", "甲"]).cast(kind)})
    assert read_all("a.parquet", tmp_path).texts == ["甲", "b", "甲"]


def test_a_missing_text_column_names_file_columns_and_option_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"body": ["x"], "title": ["y"]})
    with pytest.raises(
        SettingsError, match=r"a\.parquet: there is no column 'text' \(read\.text_column\); its columns: body, title"
    ):
        plan_units(ReadSettings(path="a.parquet"), str(tmp_path))
    assert read_all("a.parquet", tmp_path, text_column="body").texts == ["x"]


def test_columns_that_are_named_must_exist_and_fit(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"text": ["x"], "when": [1.5], "n": ["seven"]})
    for options, message in [
        ({"id_column": "key"}, "no column 'key'"),
        ({"id_column": "when"}, "not double, in column 'when'"),
        ({"text_column": "when"}, "text is wanted"),
        ({"columns": ["absent"]}, "no column 'absent'"),
    ]:
        with pytest.raises(SettingsError, match=message):
            read_all("a.parquet", tmp_path, **options)
    with pytest.raises(SettingsError, match="cannot be read as int64"):
        read_all("a.parquet", tmp_path, columns=["n:int64"])
    assert read_all("a.parquet", tmp_path, columns=["absent:int64"]).rows[0]["absent"] is None


def test_null_and_overlong_and_undecodable_texts_are_set_aside_by_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", None, "好".encode("gb18030"), b"y" * 50, "也好".encode(), b"nul\x00"], pa.binary())
    table = pa.table({"id": list("abcdef"), "text": pa.Array.from_buffers(pa.string(), 6, raw.buffers(), null_count=1)})
    write(tmp_path / "a.parquet", table)
    read = read_all("a.parquet", tmp_path, max_text_bytes=40)
    assert (read.ids, read.texts) == (["a", "e", "f"], ["good", "也好", "nul\x00"])
    assert [(row.row, row.id, row.reason) for row in read.bad] == [
        (1, "b", "missing_text"), (2, "c", "invalid_utf8"), (3, "d", "too_long"),
    ]  # fmt: skip
    assert "byte 0xba at offset 0" in read.bad[1].detail


def test_an_undecodable_id_or_address_sets_the_row_aside_too(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"], pa.binary()).buffers())
    write(tmp_path / "a.parquet", pa.table({"text": ["x", "y"], "url": bad}))
    read = read_all("a.parquet", tmp_path)
    assert (read.texts, read.reasons) == (["x"], ["invalid_utf8"])
    assert "'url'" in read.bad[0].detail


def test_a_file_that_is_no_parquet_is_one_bad_row_and_the_others_are_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"text": texts(300)})
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    (tmp_path / "d.parquet").write_bytes(b"")
    write(tmp_path / "e.parquet", {"text": ["last"]})
    read = read_all("*.parquet", tmp_path)
    assert len(read.rows) == 301
    assert [(row.where, row.reason) for row in read.bad] == [(f"{name}.parquet", "corrupt_file") for name in "bcd"]


def test_damage_in_one_row_group_costs_that_group_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": texts(500)}, rows_a_group=100, compression="zstd", use_dictionary=False)
    column = pq.read_metadata(path).row_group(2).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    read = read_all("a.parquet", tmp_path)
    assert read.texts == [*texts(500)[:200], *texts(500)[300:]]
    assert read.reasons == ["corrupt_row_group"]
    assert "rows 200 to 299 of the file (100 rows)" in read.bad[0].detail
    alone = read_all("a.parquet", tmp_path, max_unit_bytes=1)
    assert (alone.rows, [row.id for row in alone.bad]) == (read.rows, [row.id for row in read.bad])


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 60),
    rows_a_group=st.integers(1, 30),
    unit_bytes=st.integers(1, 3000),
    batch_rows=st.integers(1, 20),
    batch_bytes=st.integers(1, 500),
    with_ids=st.booleans(),
)
def test_cuts_and_batches_change_neither_rows_nor_order_nor_ids(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    rows_a_group: int,
    unit_bytes: int,
    batch_rows: int,
    batch_bytes: int,
    with_ids: bool,
) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    table: dict[str, object] = {
        "text": pa.array([None if number % 7 == 3 else text for number, text in enumerate(texts(count))], pa.string())
    }
    if with_ids:
        table["id"] = pa.array([None if number % 5 == 2 else f"i{number}" for number in range(count)], pa.string())
    write(folder / "a.parquet", table, rows_a_group)
    whole = read_all("a.parquet", folder)
    batches = {"batch_rows": batch_rows, "batch_bytes": batch_bytes}
    cut = read_all("a.parquet", folder, max_unit_bytes=unit_bytes, batches=batches)
    assert cut.rows == whole.rows
    assert [(row.id, row.where) for row in cut.bad] == [(row.id, row.where) for row in whole.bad]
    assert len(whole.rows) + len(whole.bad) == count
    assert len({*whole.ids, *(row.id for row in whole.bad)}) == count


def test_whatever_bytes_are_damaged_the_rest_of_the_file_is_read_or_the_file_is_set_aside(tmp_path: Path) -> None:
    data = write(
        tmp_path / "whole.parquet", {"id": list(map(str, range(600))), "text": texts(600)}, compression="zstd"
    ).read_bytes()
    for seed in range(60):
        chance = random.Random(seed)
        damaged = bytearray(data)
        place = chance.randrange(len(damaged))
        damaged[place : place + chance.choice([1, 100])] = chance.randbytes(chance.choice([0, 1, 100]))
        (tmp_path / "a.parquet").write_bytes(damaged)
        read = read_all("a.parquet", tmp_path)  # checks that row numbers are dense and every text is UTF-8
        assert set(read.reasons) <= {"corrupt_file", "corrupt_row_group", "invalid_utf8"}
        assert len(read.rows) == 600 or read.bad
