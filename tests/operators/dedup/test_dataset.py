"""Deduplication of plain Ray Datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data

from operators.config import SettingsError
from operators.dedup import ExactDedup, MinHashDedup
from tests.operators.dedup.corpus import directory_of, documents, kept_ids, removed_rows, run_stage, write_corpus

pytestmark = pytest.mark.usefixtures("ray_cluster")

OPTIONS = {"threshold": 0.6, "bands": 28, "rows": 4}


def dataset_of(table: pa.Table, block_rows: int) -> ray.data.Dataset:
    return ray.data.from_arrow([table.slice(start, block_rows) for start in range(0, len(table), block_rows)])


@pytest.mark.parametrize(
    "extra",
    [
        {"verify": True, "keep": "longest", "priority": ["test"]},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"partitions": 3, "signature": "datasketch"}, marks=pytest.mark.slow),
    ],
)
def test_a_dataset_loses_the_rows_that_the_stage_removes(tmp_path: Path, extra: dict[str, Any]) -> None:
    table = documents(15)
    run_stage(tmp_path, "clean", {"web": write_corpus(tmp_path, "web", table, 20)}, **OPTIONS, **extra)
    kept, removed = MinHashDedup(**OPTIONS, **extra).split(dataset_of(table, 13))
    assert [row["id"] for row in kept.take_all()] == kept_ids(directory_of(tmp_path, "clean"))
    assert removed.take_all() == removed_rows(directory_of(tmp_path, "clean"))


def test_columns_and_order_survive_and_a_lazy_dataset_is_taken(tmp_path: Path) -> None:
    table = documents(4).drop_columns(["id", "source", "quality"]).append_column("n", pa.array(range(21)))
    dataset = dataset_of(table, 5).map_batches(lambda batch: batch, batch_format="pyarrow")
    kept = MinHashDedup(**OPTIONS)(dataset).take_all()
    assert [row["n"] for row in kept] == sorted(row["n"] for row in kept)
    assert list(kept[0]) == ["text", "n"]
    assert len(kept) == 7
    removed = MinHashDedup(**OPTIONS).removed(dataset).take_all()
    assert {row["id"] for row in removed} == {str(number) for number in range(21)} - {str(row["n"]) for row in kept}


def test_exact_dedup_removes_copies_only() -> None:
    table = pa.table({"body": ["A b.", "你好", "a B", "A b.", None, "", "你好！"]})
    assert [row["body"] for row in ExactDedup(column="body")(dataset_of(table, 3)).take_all()] == [
        "A b.",
        "你好",
        "a B",
        None,
        "你好！",
    ]
    normalised = ExactDedup(column="body", exact_on="normalised")(dataset_of(table, 3)).take_all()
    assert [row["body"] for row in normalised] == ["A b.", "你好", None]


def test_wrong_options_and_columns_are_named() -> None:
    with pytest.raises(SettingsError, match="MinHashDedup: unknown key 'treshold'"):
        MinHashDedup(treshold=0.8)
    with pytest.raises(KeyError, match="no column"):
        MinHashDedup(column="body")(dataset_of(documents(1), 5))
