"""What `danlu clean` takes away and what it never touches: random mixtures of committed and stray files, local and on S3."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import storage
from cluster.lease import Lease
from operators import shards
from operators.config import SettingsError
from operators.ledger import Ledger
from operators.tables import rejects_table
from pipelines import clean as cleaning
from pipelines.clean import clean
from pipelines.cli import main
from pipelines.runner import hold
from tests.cluster.object_store import BUCKET, Line
from tests.pipelines.test_runner import parquet, write_recipe

HEX = "0123456789abcdef" * 2
STRAY = [
    "parts/00000000-000-0123456789ab.parquet", "parts/00000099-002-ffffffffffff.parquet",
    "rejects/00000001-000-0123456789ab.parquet", "measures/00000001-000-0123456789ab.parquet",
    "removed/00000000-0123456789ab.bits", "removed/00000003-0123456789ab.parquet",
    f".scratch/{HEX}", f"parts/.00000000-000-0123456789ab.parquet.{HEX}", f"units/.00000000.json.{HEX}", f".manifest.json.{HEX}",
]  # fmt: skip
STRAY_WHERE_FINISHED = [
    "keys/bands/00000000.bin",
    "keys/records/map/00000000.json",
    "work/rows/parts/x.parquet",
    ".scratch/scan/units/0.json",
]
KEPT = [
    "model/model.safetensors", "tokens.bin", "checkpoints/step-1/state.json", "result.json", "parts/notes.txt", "embeddings/0.f16",
    "timings/00000000.json", "boundaries.bin", "tasks/00000000-0123456789ab.parquet",
]  # fmt: skip


def make_stage(
    run: str, name: str, fingerprint: str, units: int = 2, finished: bool = True, inputs: dict[str, str] | None = None
) -> str:
    directory = storage.join(run, name, fingerprint)
    for unit in range(units):
        writer = shards.UnitWriter(directory, unit)
        writer.write(pa.table({"id": [f"{name}-{unit}-{row}" for row in range(3)]}))
        writer.reject(rejects_table([{"id": f"{name}-{unit}-bad", "operator": "short", "reason": "few"}]))
        writer.commit(Ledger(rows_in=4, kept=3, rejected=Counter({"short:few": 1})))
    if finished:
        shards.finish(directory, stage=name, kind="corpus", fingerprint=fingerprint, config={}, inputs=inputs or {})
    return directory


def make_run(run: str, stages: dict[str, str]) -> None:
    """run.json over `stages`: name -> fingerprint."""
    listed = {
        name: {"kind": "corpus", "directory": f"{name}/{fingerprint}", "inputs": [], "status": "done", "seconds": 1.0}
        for name, fingerprint in stages.items()
    }
    record: dict[str, Any] = {"recipe": "r", "order": list(stages), "stages": listed, "seed": 0, "limit": None, "message": None}
    storage.write_bytes(storage.join(run, "run.json"), json.dumps(record).encode())


def contents(run: str) -> dict[str, str]:
    return {
        entry.relative: hashlib.sha256(storage.read_bytes(entry.path)).hexdigest()
        for entry in storage.list_all(run)
        if not entry.relative.startswith(".lock")
    }


def put(run: str, directory: str, name: str) -> None:
    storage.write_bytes(storage.join(directory, name), b'{"stray": "x"}')


A, B, C = "a" * 16, "b" * 16, "c" * 16


def test_files_named_in_a_long_list_beside_the_manifest_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path / "run")
    directory = make_stage(run, "one", A, units=3, finished=False)
    bitmap = shards.save_bitmap(directory, 0, np.ones(8, bool))
    entry = {"path": "zero/x/parts/p.parquet", "rows": 8, "removed": bitmap, "removed_rows": 8}
    monkeypatch.setattr(shards, "_MOST_LISTED", 0)
    shards.finish(
        directory,
        stage="one",
        kind="dedup",
        fingerprint=A,
        config={},
        inputs={},
        view=[entry],
        ledger=Ledger(8, 0, 0, Counter({"d": 8})),
    )
    make_run(run, {"one": A})
    put(run, directory, f"removed/00000001-{'0' * 12}.bits")
    before = contents(run)
    clean(run)
    assert set(before) - set(contents(run)) == {f"one/{A}/removed/00000001-{'0' * 12}.bits"}


def mixture(run: str, stray: list[tuple[int, int]], kept: list[tuple[int, int]], loose: bool) -> dict[str, str]:
    """A run with a finished and an unfinished stage and strays; what must be left after cleaning."""
    done, open_ = make_stage(run, "one", A), make_stage(run, "two", B, finished=False)
    make_run(run, {"one": A, "two": B})
    for stage, choice in kept:
        put(run, (done, open_)[stage], KEPT[choice % len(KEPT)])
    for name in STRAY_WHERE_FINISHED:  # an unfinished stage goes on from these
        put(run, open_, name)
    storage.write_bytes(storage.join(run, ".replies", "one.jsonl"), b"{}\n")
    before = contents(run)
    for stage, choice in stray:
        names = STRAY + STRAY_WHERE_FINISHED if stage == 0 else STRAY
        put(run, (done, open_)[stage], names[choice % len(names)])
    if loose:
        put(run, run, f".run.json.{HEX}")
        put(run, run, ".train/training-1/.validate_storage_marker")
    return before


choices = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50)), max_size=12)


@settings(max_examples=10, deadline=None)
@given(stray=choices, kept=choices, loose=st.booleans())
def test_exactly_the_strays_go_and_what_stays_is_byte_for_byte_as_it_was(
    stray: list[tuple[int, int]], kept: list[tuple[int, int]], loose: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        before = mixture(run, stray, kept, loose)
        full = contents(run)
        told = clean(run, dry_run=True)
        assert contents(run) == full, "a dry run removed something"
        done = clean(run)
        assert contents(run) == before
        assert sum(done.files.values()) == len(full) - len(before) == sum(told.files.values())
        assert shards.load_manifest(f"{run}/one/{A}").rows == 6 and len(shards.committed_units(f"{run}/two/{B}")) == 2
        assert sum(clean(run).files.values()) == 0


def test_a_run_on_an_object_store_is_cleaned_alike(line: Line) -> None:
    run = f"s3://{BUCKET}/clean/run"
    before = mixture(run, [(0, number) for number in range(14)] + [(1, number) for number in range(10)], [(0, 0), (1, 3)], True)
    done = clean(run)
    assert contents(run) == before and sum(done.files.values()) == 26


def test_a_file_that_only_a_record_of_an_unfinished_stage_names_stays(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    directory = make_stage(run, "one", A, finished=False)
    make_run(run, {"one": A})
    for name in ("removed/00000000-0123456789ab.bits", "removed/00000001-0123456789ab.bits"):
        put(run, directory, name)
    record = {"bitmap": "removed/00000000-0123456789ab.bits", "table": None}
    storage.write_bytes(storage.join(directory, "keys/records/remove/00000000.json"), json.dumps(record).encode())
    assert clean(run).files == {"unreferenced": 1}
    assert storage.exists(storage.join(directory, record["bitmap"] or ""))


def test_a_folder_that_the_manifest_names_stays_whatever_it_is_called(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    directory = make_stage(run, "one", A, finished=False)
    make_run(run, {"one": A})
    shards.finish(directory, stage="one", kind="own", fingerprint=A, config={}, inputs={}, files={"made": "work/model"})
    for name in ("work/model/weights.bin", "work/rest.bin"):
        put(run, directory, name)
    assert clean(run).files == {"exchanged keys": 1}
    assert storage.exists(storage.join(directory, "work/model/weights.bin"))


def test_superseded_fingerprints_go_on_demand_but_never_one_that_the_run_reads(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    make_stage(run, "one", A)
    make_stage(run, "one", B)
    make_stage(run, "one", C)
    make_stage(run, "two", A, inputs={"one": f"one/{B}"})
    make_stage(run, "gone", A)
    make_run(run, {"one": A, "two": A})
    assert clean(run).superseded == {}
    with pytest.raises(SettingsError, match="give that too"):
        clean(run, older=[C])
    with pytest.raises(SettingsError, match="the run uses this fingerprint"):
        clean(run, superseded=True, older=[f"one/{B}"])
    with pytest.raises(SettingsError, match="no superseded fingerprint"):
        clean(run, superseded=True, older=["d" * 16])
    assert set(clean(run, superseded=True, older=[C], dry_run=True).superseded) == {f"one/{C}"}
    assert set(clean(run, superseded=True).superseded) == {f"one/{C}", f"gone/{A}"}
    assert sorted(os.listdir(f"{run}/one")) == [A, B]


def test_what_an_unfinished_stage_may_take_over_stays_unless_it_is_named(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    make_stage(run, "one", A, finished=False)
    make_stage(run, "one", B)
    make_run(run, {"one": A})
    found = clean(run, superseded=True)
    assert found.superseded == {} and "may take its units over" in found.kept_back[0]
    assert set(clean(run, superseded=True, older=[B]).superseded) == {f"one/{B}"}


def test_a_run_at_work_is_not_cleaned(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    make_stage(run, "one", A)
    make_run(run, {"one": A})
    with hold(run, lambda _: None), pytest.raises(SettingsError, match=f"in use by process {os.getpid()}"):
        clean(run)
    clean(run)


def test_a_lease_on_an_object_store_keeps_cleaning_out(line: Line) -> None:
    run = f"s3://{BUCKET}/clean/held"
    make_stage(run, "one", A)
    make_run(run, {"one": A})
    lease = Lease(run, lambda _: None)
    lease.claim()
    try:
        with pytest.raises(SettingsError, match="in use by process"):
            clean(run)
    finally:
        lease.release()


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no run"):
        clean(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_command_tells_counts_and_sizes_and_the_run_finds_everything_done_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(tmp_path, ray="false")
    recipe, run = str(tmp_path / "recipe.yaml"), tmp_path / "runs" / "toy"
    assert main(["run", recipe, "--runs", str(tmp_path / "runs")]) == 0
    (stage,) = (run / "b").iterdir()
    (stage / "parts" / "00000007-000-0123456789ab.parquet").write_bytes(b"x" * 2500)
    before = contents(str(run))
    assert main(["clean", str(run)]) == 0 and "removed 1 unreferenced files, 2.5 kB" in capsys.readouterr().out
    assert main(["run", recipe, "--runs", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().err.count("done before") == 3
    del before[f"b/{stage.name}/parts/00000007-000-0123456789ab.parquet"]
    after = contents(str(run))
    told = {"run.json", "report.html", "status.json", "log.jsonl"}
    assert {k: v for k, v in before.items() if k not in told} == {k: v for k, v in after.items() if k not in told}
    assert cleaning.size(999) == "999 bytes"


def test_an_interrupted_run_goes_on_after_cleaning_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    write_recipe(tmp_path, ray="false")
    assert main(["run", str(recipe), "--runs", str(tmp_path / "runs")]) == 0
    undisturbed = parquet(tmp_path)
    run = tmp_path / "runs" / "toy"
    (stage,) = (run / "b").iterdir()
    (stage / "manifest.json").unlink()
    (stage / "units" / "00000005.json").unlink()  # as a kill between the part and its record leaves it
    (stage / ".scratch").mkdir(exist_ok=True)
    (stage / ".scratch" / HEX).write_bytes(b"half a file")
    before = {path: path.stat().st_mtime_ns for path in stage.glob("parts/*")}
    done = clean(str(run))
    assert done.files == {"unreferenced": 1, "scratch": 1}
    assert main(["run", str(recipe), "--runs", str(tmp_path / "runs")]) == 0
    assert parquet(tmp_path) == undisturbed
    after = {path: path.stat().st_mtime_ns for path in stage.glob("parts/*")}
    assert sum(after[path] != time for path, time in before.items()) == 1, "a committed unit was done again"
