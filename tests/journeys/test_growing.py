"""A directory that grows: only new and changed files are read, the rows are those of a run over everything, and what was taken
down stays out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from operators import shards
from pipelines.cli import main

TEXTS = [
    "The river rises in the hills and turns three mills before it meets the sea, {n}.",
    "河流发源于群山之中，在汇入大海之前推动了三座水磨，这是第{n}段记录。",
]


def text_of(number: int) -> str:
    return TEXTS[number % 2].format(n="".join("零一二三四五六七八九"[int(digit)] for digit in str(number)))


def write(folder: Path, name: str, numbers: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"{name}-{n}", "text": text_of(n)} for n in numbers] + [{"id": f"{name}-short", "text": "no"}]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def danlu(tmp_path: Path, ray_cluster: None) -> Callable[..., Path]:
    """Runs stages over files below tmp_path; returns the run's directory."""

    def run(stages: dict[str, Any], runs: str = "runs") -> Path:
        recipe = {"name": "growing", "stages": stages}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert main(["run", "recipe.yaml", "--runs", runs]) == 0
        return tmp_path / runs / "growing"

    return run


def stage(run: Path, name: str) -> tuple[Path, shards.Manifest]:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    directory = run / record["stages"][name]["directory"]
    return directory, shards.load_manifest(str(directory))


def read_again(run: Path, name: str) -> set[str]:
    """The input files whose units this fingerprint of a corpus stage read itself: units that are taken over have no timings."""
    directory, _ = stage(run, name)
    read = {int(path.stem) for path in (directory / "timings").glob("*.json")}
    return {record["input"] for number, record in shards.unit_records(str(directory)) if number in read}


def ids(run: Path, *names: str) -> list[str]:
    parts = shards.parts([str(stage(run, name)[0]) for name in names])
    return [row for part in parts for _, batch in shards.read(part, ["id"]) for row in batch["id"].to_pylist()]


def compared(run: Path, name: str) -> list[Any]:
    """Names, sizes and checksums of all that a stage wrote, and its account."""
    _, manifest = stage(run, name)
    return [list(manifest.parts), list(manifest.rejects), list(manifest.measures), manifest.ledger, manifest.stats, manifest.view]


def test_new_and_changed_files_alone_are_read_and_the_result_is_that_of_a_run_over_all(
    tmp_path: Path, danlu: Callable[..., Path]
) -> None:
    stages: dict[str, Any] = {
        "web": {"kind": "corpus", "read": {"path": "in"}, "operators": [{"filter_lengths": {"min_characters": 5}}]},
    }
    for name, numbers in (("a", range(20)), ("b", range(15, 40)), ("c", range(60, 80)), ("d", range(30, 50))):
        write(tmp_path / "in", name, numbers)
    run = danlu(stages)
    assert read_again(run, "web") == {"a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"}

    write(tmp_path / "in", "ab", range(35, 70))  # new: comes second
    write(tmp_path / "in", "d", range(30, 55))  # changed
    (tmp_path / "in" / "c.jsonl").unlink()
    assert danlu(stages) == run
    assert read_again(run, "web") == {"ab.jsonl", "d.jsonl"}
    fresh = danlu(stages, "fresh")
    assert read_again(fresh, "web") == {"a.jsonl", "ab.jsonl", "b.jsonl", "d.jsonl"}
    assert compared(run, "web") == compared(fresh, "web")

    gone = ["a-3", "ab-69"]  # of a file that stays as it is, and of one that will change
    assert main(["forget", str(run), *gone]) == 0
    write(tmp_path / "in", "ab", range(35, 75))
    write(tmp_path / "in", "e", range(100, 110))
    danlu(stages)
    assert read_again(run, "web") == {"ab.jsonl", "e.jsonl"}
    files = (("a", range(20)), ("ab", range(35, 75)), ("b", range(15, 40)), ("d", range(30, 55)), ("e", range(100, 110)))
    whole = [f"{name}-{n}" for name, numbers in files for n in numbers]
    assert ids(run, "web") == [row for row in whole if row not in gone]
    ledger = stage(run, "web")[1].ledger
    assert ledger.forgotten == 2 and ledger.rows_in == len(whole) + len(files)
    assert text_of(3) not in str([pq.read_table(path).to_pylist() for path in run.rglob("parts/*.parquet")])


def test_batches_with_a_kept_index_compare_new_rows_alone_and_leave_the_rows_of_one_pass(
    tmp_path: Path, danlu: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "monday", "m", range(40))
    write(tmp_path / "tuesday", "t", range(30, 60))

    def day(name: str, index: str | None = "index") -> dict[str, Any]:
        kept = {} if index is None else {"index": index}
        return {
            name: {"kind": "corpus", "read": {"path": name}, "operators": [{"filter_lengths": {"min_characters": 5}}]},
            f"{name}_clean": {"kind": "dedup", "input": name, "method": "exact", **kept},
        }

    run = danlu(day("monday"))
    monday = ids(run, "monday_clean")
    capfd.readouterr()
    danlu({**day("monday"), **day("tuesday")})
    assert capfd.readouterr().err.count("done before") == 2
    _, manifest = stage(run, "tuesday_clean")
    assert manifest.stats["index"]["matched"] == 10 and manifest.ledger.rows_in == 30
    both = {**day("monday", None), **day("tuesday", None)}
    both["monday_clean"]["input"] = ["monday", "tuesday"]
    once = danlu(both, "once")
    assert ids(run, "monday_clean", "tuesday_clean") == ids(once, "monday_clean")
    assert monday == ids(run, "monday_clean")


def test_rows_that_are_in_the_index_already_are_removed_as_their_own_copies_and_that_is_said(
    tmp_path: Path, danlu: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "pages", "a", range(20))
    recipe = {
        "pages": {"kind": "corpus", "read": {"path": "pages"}, "operators": [{"filter_lengths": {"min_characters": 5}}]},
        "clean": {"kind": "dedup", "input": "pages", "method": "exact", "index": "index"},
    }
    danlu(recipe)
    write(tmp_path / "pages", "b", range(20, 25))
    capfd.readouterr()
    run = danlu(recipe)
    assert "20 rows are in the index already under their own id" in capfd.readouterr().err
    _, manifest = stage(run, "clean")
    assert manifest.stats["index"]["own_copies"] == 20 and manifest.ledger.kept == 5
