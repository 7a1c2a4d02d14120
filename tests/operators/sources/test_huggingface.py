"""Folders of Hugging Face `datasets`: saved ones and ones laid out as on the Hub."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.config import SettingsError
from operators.sources import ReadSettings, plan_units
from tests.operators.sources.reading import read_all

ROWS = [{"id": f"h{number}", "text": f"第 {number} 篇", "n": number} for number in range(2500)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(folder / "one"), num_shards=3)
    splits = datasets.DatasetDict({"train": data.select(range(2000)), "validation": data.select(range(2000, 2500))})
    splits.save_to_disk(str(folder / "two"))
    return folder


def test_what_save_to_disk_wrote_is_read_in_its_order(saved: Path) -> None:
    read = read_all(saved / "one", format="huggingface", columns=["n"])
    assert [(row["id"], row["text"], row["n"]) for row in read.rows] == [(row["id"], row["text"], row["n"]) for row in ROWS]
    assert len(read.units) == 3
    assert read_all(saved / "one", format="huggingface", batches={"batch_rows": 7}).ids == read.ids


def test_caches_beside_the_data_are_not_data(saved: Path) -> None:
    cache = saved / "one" / "cache-0123.arrow"
    cache.write_bytes((saved / "one" / "data-00000-of-00003.arrow").read_bytes())
    try:
        assert len(read_all(saved / "one", format="huggingface").rows) == 2500
    finally:
        cache.unlink()


def test_a_split_is_a_folder_or_a_piece_of_the_name(saved: Path, tmp_path: Path) -> None:
    assert read_all(saved / "two", format="huggingface", split="validation").ids == [row["id"] for row in ROWS[2000:]]
    (tmp_path / "data").mkdir()
    for name, rows in (("train-00000-of-00001", ROWS[:3]), ("test-00000-of-00001", ROWS[3:5])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# 数据卡", "utf-8")
    assert read_all(tmp_path, format="huggingface", split="test").ids == ["h3", "h4"]
    assert len(read_all(tmp_path, format="huggingface").rows) == 5
    with pytest.raises(FileNotFoundError, match="no data file of split 'dev'"):
        plan_units(ReadSettings(path=str(tmp_path), format="huggingface", split="dev"), ".")
    with pytest.raises(ValueError, match="split: is for format huggingface"):
        ReadSettings(path="a", split="train")


def test_a_saved_set_with_a_missing_shard_is_refused(saved: Path, tmp_path: Path) -> None:
    for path in (saved / "one").iterdir():
        if path.name != "data-00001-of-00003.arrow":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SettingsError, match=r"lists 'data-00001-of-00003\.arrow', which is not in its folder"):
        plan_units(ReadSettings(path=str(tmp_path), format="huggingface"), ".")


def test_a_stream_that_breaks_keeps_the_batches_before(saved: Path, tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string())])
    with pa.OSFile(str(tmp_path / "whole.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for number in range(20):
            writer.write_batch(pa.record_batch([[f"行 {number}-{row}" for row in range(50)]], schema))
    data = (tmp_path / "whole.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(data[: len(data) // 2])
    read = read_all("cut.arrow", tmp_path)
    assert 200 < len(read.rows) < 600
    assert (len(read.rows) % 50, read.reasons) == (0, ["corrupt_file"])
    assert read.texts == [row["text"] for row in read_all("whole.arrow", tmp_path).rows][: len(read.rows)]
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([["文件格式"]], schema))
    assert read_all("file.arrow", tmp_path).texts == ["文件格式"]
    (tmp_path / "none.arrow").write_bytes(b"no arrow at all, just text")
    assert read_all("none.arrow", tmp_path).reasons == ["corrupt_file"]
