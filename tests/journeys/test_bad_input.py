"""Bad input is a clear error or a counted, kept reject; the run goes on where a row can be set aside."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators import shards
from pipelines.cli import main
from tests.conftest import ROOT

GOOD = "A sentence that is long enough to be kept, 还有一些中文内容。"


def write_bad_files(folder: Path) -> None:
    folder.mkdir()
    lines = [json.dumps({"id": f"g{i}", "text": f"{GOOD} {i}"}, ensure_ascii=False).encode() for i in range(200)]
    whole = gzip.compress(b"\n".join(lines))
    (folder / "a-truncated.jsonl.gz").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "b-corrupt.parquet").write_bytes(b"PAR1" + os.urandom(500) + b"PAR1")
    (folder / "c-empty.jsonl").write_bytes(b"")
    bad = [
        json.dumps({"id": "nul", "text": "with a \x00 byte inside " + GOOD}).encode(),
        b'{"id": "broken", "text": ',
        b'{"id": "latin", "text": "caf\xe9"}',
        b'{"id": "no-text"}',
        b'{"id": "number", "text": 5}',
        b"[1, 2]",
        json.dumps({"id": "twice", "text": GOOD + " first"}, ensure_ascii=False).encode(),
        json.dumps({"id": "twice", "text": GOOD + " second"}, ensure_ascii=False).encode(),
    ]
    (folder / "d-lines.jsonl").write_bytes(b"\n".join(bad) + b"\n")
    with (folder / "e-huge.jsonl").open("wb") as stream:
        stream.write(b'{"id": "huge", "text": "')
        for _ in range(60):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n' + json.dumps({"id": "after", "text": GOOD}, ensure_ascii=False).encode())
    table = pa.table({"id": ["p0", "p1"], "text": [GOOD, None]})
    pq.write_table(table, folder / "f-nulls.parquet")


def run(directory: Path, stages: dict[str, Any], *arguments: str) -> tuple[int, Path]:
    (directory / "recipe.yaml").write_text(json.dumps({"name": "bad", "stages": stages}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        return main(["run", "recipe.yaml", *arguments]), directory / "runs" / "bad"


def finished(run_directory: Path, stage: str) -> tuple[Path, shards.Manifest]:
    (directory,) = [path for path in (run_directory / stage).iterdir() if (path / "manifest.json").exists()]
    return directory, shards.load_manifest(str(directory))


def test_every_bad_row_is_set_aside_with_its_reason_and_the_good_ones_go_on(tmp_path: Path, ray_cluster: None) -> None:
    write_bad_files(tmp_path / "input")
    code, made = run(
        tmp_path,
        {"docs": {"kind": "corpus", "read": {"path": "input"}}, "once": {"kind": "dedup", "input": "docs", "method": "exact"}},
    )
    assert code == 0
    directory, manifest = finished(made, "docs")
    rows = [row for part in manifest.rejects for row in pq.read_table(directory / part["name"]).to_pylist()]
    assert all(row["quarantined"] and row["operator"] == "read" and row["reason"] and row["detail"] for row in rows)
    by_file = Counter(next(name for name in "abcdef" if f"{name}-" in row["detail"]) for row in rows)
    assert by_file == {"a": 1, "b": 1, "d": 5, "e": 1, "f": 1}
    kept = [row for part in manifest.parts for row in pq.read_table(directory / part["name"]).to_pylist()]
    ids = [row["id"] for row in kept]
    assert {"nul", "twice", "after", "p0"} <= set(ids)
    assert sum(row_id.startswith("g") for row_id in ids) > 20, "the rows before the break of the gzip stream are kept"
    assert "\x00" in next(row["text"] for row in kept if row["id"] == "nul")
    assert manifest.ledger.quarantined == len(rows)
    assert finished(made, "once")[1].stats["duplicate_ids"]
    peak = shards.load_timings(str(directory))["peak_rss_bytes"]
    assert peak < 1 << 30, "a line of 60 MB is passed over in bounded memory"


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ({"a": {"kind": "corpus", "read": {"path": "nothing/*.jsonl"}}}, "nothing/*.jsonl"),
        ({"a": {"kind": "corpus", "read": {"path": "other.parquet"}}}, "text_column"),
        ({"a": {"kind": "dedup", "input": "b"}, "b": {"kind": "dedup", "input": "a"}}, "cycle"),
        (
            {"a": {"kind": "corpus", "read": {"path": "other.parquet"}, "operators": ["gopher_qualty"]}},
            "did you mean 'gopher_quality'",
        ),
        (
            {"a": {"kind": "self_instruct", "seeds": "seeds.jsonl", "generator": {"model": "models/none"}}},
            "models/none",
        ),
        ({"a": {"kind": "self_instruct", "seeds": "seeds.jsonl", "generator": {"model": "packaged:gpt"}}}, "packaged:gpt"),
        (
            {"a": {"kind": "corpus", "read": {"path": "seeds.jsonl"}, "operators": [{"detect_language": {"model": "none.ftz"}}]}},
            "none.ftz",
        ),
    ],
)
def test_what_no_row_is_guilty_of_is_an_error_before_anything_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], stages: dict[str, Any], told: str
) -> None:
    pq.write_table(pa.table({"id": ["a"], "body": ["b"]}), tmp_path / "other.parquet")
    (tmp_path / "seeds.jsonl").write_text('{"id": "s", "text": "t"}\n', encoding="utf-8")
    code, made = run(tmp_path, stages)
    error = capfd.readouterr().err
    assert code == 2
    assert told in error
    assert "starting Ray" not in error
    assert "Traceback" not in error
    assert not list(made.glob("*/*/manifest.json"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.slow  # two runs with a Ray of their own; tests/faults and the reply cache fill disks in the ordinary suite
def test_a_full_disk_stops_the_run_with_a_message_and_it_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=False, capture_output=True).returncode:
        pytest.skip("this sandbox does not allow mounts")
    try:
        rows = [json.dumps({"id": str(i), "text": os.urandom(200).hex()}) for i in range(20_000)]
        (tmp_path / "in.jsonl").write_text("\n".join(rows), encoding="utf-8")
        stages = {"a": {"kind": "corpus", "read": {"path": "in.jsonl", "max_unit_bytes": 1_000_000}}}
        (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "bad", "stages": stages}), encoding="utf-8")
        command = [sys.executable, "-m", "pipelines", "run", "recipe.yaml", "--runs", str(disk)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        full = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert full.returncode == 1
        assert "the disk is full" in full.stderr
        assert "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
        assert finished(disk / "bad", "a")[1].ledger.kept == 20_000
    finally:
        subprocess.run(["umount", str(disk)], check=False)
