"""The readers as a lazy Ray Data dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.config import SettingsError
from operators.sources.documents import read_documents


def test_every_row_arrives_whatever_its_format_and_unit(ray_cluster: None, tmp_path: Path) -> None:
    rows = [{"id": str(number), "text": f"文档 {number}"} for number in range(500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    pq.write_table(pa.table({"id": ["p"], "text": ["parquet"]}), tmp_path / "b.parquet")
    dataset = read_documents("*", base_directory=str(tmp_path), max_unit_bytes=4000)
    found = dataset.map_batches(
        lambda table: table.append_column("n", pa.array(range(table.num_rows))), batch_format="pyarrow"
    ).take_all()
    assert sorted(row["id"] for row in found) == sorted([str(number) for number in range(500)] + ["p"])
    assert next(row["text"] for row in found if row["id"] == "7") == "文档 7"


def test_unreadable_rows_can_fail_the_read(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\nbad\n')
    assert read_documents(str(tmp_path / "a.jsonl")).count() == 1
    with pytest.raises(Exception, match=r"a\.jsonl: line at byte 17: bad_json"):
        read_documents(str(tmp_path / "a.jsonl"), on_bad_rows="raise").materialize()


def test_wrong_settings_are_refused_before_ray_is_asked(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="unknown key 'text_colum'; did you mean 'text_column'"):
        read_documents(str(tmp_path), text_colum="body")
    with pytest.raises(FileNotFoundError):
        read_documents(str(tmp_path / "none.jsonl"))
