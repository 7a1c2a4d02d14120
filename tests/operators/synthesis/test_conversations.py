"""Files of chat data, row by row: bad lines, long lines, arrays, tables."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.synthesis.conversations import Unreadable, read_rows


def test_bad_lines_are_unreadable_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as stream:
        stream.write(b'{"a": 1}\n\n{broken\n"text"\n\xff\xfe\n{"a": "\\ud800"}\n' + b'{"a": "' + b"x" * 3_000_000 + b'"}')
    items = [item for _, item in read_rows(str(path))]
    assert [isinstance(item, Unreadable) for item in items] == [False, True, True, True, True, False]
    assert isinstance(items[1], Unreadable)
    assert "line 3" in items[1].detail


def test_an_overlong_line_is_set_aside_without_holding_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operators.synthesis.conversations.MAX_ROW_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 5_000_000 + b'"}\n{"a": 2}\n')
    assert [type(item) for _, item in read_rows(str(path))] == [dict, Unreadable, dict]


def test_a_json_array_is_read_like_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": 1}, 5, {"a": 2}]))
    assert [type(item) for _, item in read_rows(str(path))] == [dict, Unreadable, dict]


def test_tables_are_read_like_lines(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "id": str(n)} for n in range(5)
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, 2)
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, 2)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert [item for _, item in read_rows(str(tmp_path / name))] == rows
    (tmp_path / "d.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"d\.parquet"):
        list(read_rows(str(tmp_path / "d.parquet")))
