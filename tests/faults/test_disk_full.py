"""Disks that are full: where a run's output lies, and where a node keeps scratch and copies. The message says which; with room
made, the same work goes on to the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from cluster import disk, storage
from cluster.disk import DiskFull
from operators import corpus, shards
from operators.dedup import exchange
from operators.sources.units import ReadSettings, plan_units
from operators.supervise import Report, Task
from operators.tokens import twin
from tests.cluster.object_store import BUCKET, Line, ObjectStore
from tests.conftest import ROOT
from tests.faults.test_kill_run import outcome, write_recipe

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of its own at `place`; gives a function that makes it larger."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("this sandbox does not allow mounts")
    try:
        yield lambda larger: subprocess.run(["mount", "-o", f"remount,size={larger}", str(place)], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def write_rows(path: Path, rows: int) -> None:
    """Lines that compress badly."""
    path.write_text("".join(json.dumps({"id": str(n), "text": os.urandom(200).hex()}) + "\n" for n in range(rows)), "utf-8")


def corpus_units(source: str, directory: str) -> list[dict[str, Any]]:
    read = ReadSettings(path=source, max_unit_bytes=200_000)
    rest = {"read": read.model_dump(mode="json"), "operators": [], "batch_rows": 200, "measure": "seen", "directory": directory}
    return [{"unit": unit.to_json(), "key": unit.key, **rest} for unit in plan_units(read, "/")]


def run_corpus(units: list[dict[str, Any]], told: Callable[[dict[str, Any]], None] = lambda message: None) -> None:
    """The units of a corpus stage one after the other in this process, committed ones left out; then the manifest."""
    directory = units[0]["directory"]
    done = shards.committed_numbers(directory)
    for arguments in units:
        if arguments["unit"]["index"] not in done:
            corpus.run_unit(Task(arguments), Report(told))
    shards.finish(directory, stage="docs", kind="corpus", fingerprint="f0", config={}, inputs={})


def files(directory: str) -> dict[str, str]:
    """SHA-256 of the Parquet files of a stage, local or not."""
    return {e.relative: storage.sha256_of(e.path) for e in storage.list_all(directory) if e.relative.endswith(".parquet")}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """This process's folder for temporary files, on a disk of 300 KiB."""
    with small_disk(tmp_path / "scratch", "300k") as enlarge:
        monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield tmp_path / "scratch", enlarge
    tempfile.tempdir = None


def test_a_full_output_names_its_disk_and_room_and_leaves_nothing_half_committed(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 2000)
    calm = corpus_units(str(tmp_path / "in.jsonl"), str(tmp_path / "calm"))
    run_corpus(calm)
    with small_disk(tmp_path / "disk", "300k") as enlarge:
        directory = str(tmp_path / "disk" / "docs")
        units = corpus_units(str(tmp_path / "in.jsonl"), directory)
        with pytest.raises(DiskFull, match=rf"the disk is full that holds {tmp_path}/disk.* of 300\.0 KiB are free.*--runs"):
            run_corpus(units)
        committed = shards.committed_units(directory)
        assert 0 < len(committed) < len(units)
        named = {part["name"] for record in committed.values() for part in record["parts"]}
        assert all(storage.size(storage.join(directory, name)) for name in named)
        assert not storage.exists(storage.join(directory, "manifest.json"))
        assert not list(Path(directory, ".scratch").iterdir()), "what was given up takes no room"
        enlarge("100m")
        run_corpus(units)
        assert files(directory) == files(calm[0]["directory"])


def test_full_scratch_of_a_run_on_a_store_names_the_folder_and_what_moves_it(
    tmp_path: Path, temporary: tuple[Path, Callable[[str], None]], line: Line
) -> None:
    """Parts are written to the node's folder for temporary files before they are uploaded."""
    scratch, enlarge = temporary
    write_rows(tmp_path / "in.jsonl", 2000)
    calm = corpus_units(str(tmp_path / "in.jsonl"), str(tmp_path / "calm"))
    run_corpus(calm)
    directory = f"s3://{BUCKET}/{tmp_path.name}/docs"
    units = corpus_units(str(tmp_path / "in.jsonl"), directory)
    (scratch / "of another program").write_bytes(bytes(250_000))
    with pytest.raises(DiskFull, match=rf"holds {scratch} .* of 300\.0 KiB are free.*another folder in TMPDIR"):
        run_corpus(units)
    assert [path.name for path in scratch.iterdir()] == ["of another program"]
    assert not shards.committed_numbers(directory)
    enlarge("100m")
    run_corpus(units)
    assert files(directory) == files(calm[0]["directory"])
    assert [path.name for path in scratch.iterdir()] == ["of another program"]


@pytest.mark.parametrize("what", ["keys", "tokens"])
def test_full_scratch_of_an_exchange_and_of_packed_tokens_is_told_and_given_back(
    tmp_path: Path, temporary: tuple[Path, Callable[[str], None]], line: Line, what: str
) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    scratch, enlarge = temporary
    directory = f"s3://{BUCKET}/{tmp_path.name}"
    numbers = np.random.default_rng(0).integers(0, 60_000, 200_000, dtype=np.uint64)
    rows = pa.table({"tokens": [part.tolist() for part in numbers.reshape(-1, 1000)], "cu_seqlens": [[0, 1000]] * 200})
    pq.write_table(rows, tmp_path / "packed.parquet")

    def write() -> None:
        if what == "keys":
            exchange.write_array(directory, exchange.data_path(directory, "edges", 0), numbers)
        else:
            twin.write_twin(
                directory, [str(tmp_path / "packed.parquet")], length=1000, vocab_size=60_000, eos_token_id=0, padding_token_id=0
            )

    with pytest.raises(DiskFull, match=rf"holds {scratch} .*another folder in TMPDIR"):
        write()
    assert not list(scratch.iterdir())
    assert not storage.list_all(directory), "nothing is there before it is whole"
    enlarge("100m")
    write()
    if what == "keys":
        assert np.array_equal(exchange.read_all(directory, "edges", [0], 1)[:, 0], numbers)
    else:
        stored = np.frombuffer(storage.read_bytes(f"{directory}/{twin.TOKENS}"), "<u2")
        assert np.array_equal(stored, numbers.astype("<u2"))


def test_which_disk_is_full_is_told_where_only_the_system_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's message without a name, and one that another machine has told already."""
    with small_disk(tmp_path / "disk", "64k"):
        (tmp_path / "disk" / "x").write_bytes(bytes(60_000))
        error = RuntimeError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device")
        assert disk.is_full(error)
        told = disk.full(error, str(tmp_path / "disk" / "run" / "docs"))
        assert f"holds {tmp_path}/disk/run/docs on " in str(told) and "of 64.0 KiB are free" in str(told)
        assert str(disk.full(RuntimeError(f"TrainingError: {told}"))) == f"TrainingError: {told}"
        monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "disk"))
        assert "another folder in DANLU_CACHE" in str(disk.full(error, "s3://bucket/run"))


def danlu(directory: Path, environment: dict[str, str], runs: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", "run", "recipe.yaml", "--limit", "200", "--runs", runs]
    whole = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=whole, capture_output=True, text=True, check=False, timeout=400)


@pytest.mark.slow
def test_a_run_whose_disk_is_full_in_corpus_and_in_dedup_ends_at_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    calm = danlu(tmp_path, {}, "runs")
    assert calm.returncode == 0, calm.stderr
    wanted, whole = outcome(tmp_path), (tmp_path / "recipe.yaml").read_text("utf-8")
    recipe = yaml.safe_load(whole)
    recipe["stages"] = {name: recipe["stages"][name] for name in ("web", "docs")}
    corpus_alone = yaml.safe_dump(recipe, allow_unicode=True)
    with small_disk(tmp_path / "disk", "300k") as enlarge:
        ballast = tmp_path / "disk" / "of another program"

        def run(text: str) -> subprocess.CompletedProcess[str]:
            (tmp_path / "recipe.yaml").write_text(text, "utf-8")
            return danlu(tmp_path, {}, str(tmp_path / "disk" / "runs"))

        def full(made: subprocess.CompletedProcess[str], stages: str) -> None:
            assert made.returncode == 1 and "Traceback" not in made.stderr, made.stderr
            told = rf"({stages}): FAILED: the disk is full that holds {tmp_path}/disk/\S+ on \S+: \S+ \S+ of .* are free"
            assert re.search(told, made.stderr), made.stderr

        full(run(corpus_alone), "web|docs")
        enlarge("100m")
        assert run(corpus_alone).returncode == 0
        room = os.statvfs(tmp_path / "disk")
        ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - (60 << 10)))
        full(run(whole), "clean")
        ballast.unlink()
        made = run(whole)
        assert made.returncode == 0, made.stderr
        result = tmp_path / "disk" / "runs" / "killed-limit-200"
        assert {name: storage.sha256_of(str(result / name)) for name in wanted} == wanted


@pytest.mark.slow
def test_a_run_on_a_store_whose_node_has_no_scratch_goes_on_in_another_folder(tmp_path: Path, object_store: ObjectStore) -> None:
    write_recipe(tmp_path)
    calm = danlu(tmp_path, {}, "runs")
    assert calm.returncode == 0, calm.stderr
    runs = f"s3://{BUCKET}/{tmp_path.name}"
    with small_disk(tmp_path / "t", "100k"):
        full = danlu(tmp_path, {**object_store.environment(), "TMPDIR": str(tmp_path / "t"), "RAY_TMPDIR": "/tmp"}, runs)
        assert full.returncode == 1, full.stderr
        assert f"holds {tmp_path}/t on" in full.stderr and "TMPDIR" in full.stderr
    again = danlu(tmp_path, object_store.environment(), runs)
    assert again.returncode == 0, again.stderr
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment().items():
            patch.setenv(name, value)
        wanted = outcome(tmp_path)
        assert {name: storage.sha256_of(f"{runs}/killed-limit-200/{name}") for name in wanted} == wanted
