"""The pretraining loop: resume after a real kill, agreement between numbers of workers, and honest failure."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from operators import shards, tables
from tests.train.conftest import SHAPE, write_rows
from train import checkpoint, models, pretrain
from train.errors import JobCancelled, NonFiniteLoss
from train.parallel import Workers
from train.settings import ModelShape, PretrainJob, RowsInput

ROOT = Path(__file__).resolve().parents[2]


def job(packed: str, **changes: Any) -> PretrainJob:
    values = {
        "inputs": [RowsInput(name="tokens", directory=packed)], "model": ModelShape(**SHAPE), "steps": 24,
        "learning_rate": 5e-3, "checkpoint_every": 5,
    }  # fmt: skip
    return PretrainJob(**{**values, **changes})


def launch(settings: PretrainJob, directory: Path, rank: int = 0, world: int = 1, port: int = 0) -> subprocess.Popen[str]:
    """One worker as torchrun would start it."""
    path = directory.parent / f"job-{directory.name}.json"
    path.write_text(settings.model_dump_json())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if world > 1:
        environment |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    command = [sys.executable, "-m", "train.pretrain", str(path), str(directory)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def curve(result: dict[str, Any]) -> list[float]:
    return [point["loss"] for point in result["curve"]]


def taken(directory: Path) -> list[dict[str, Any]]:
    return [
        row
        for part in shards.committed_units(str(directory))[0]["parts"]
        for row in pq.read_table(directory / part["name"]).to_pylist()
    ]


def killed(packed: str, directory: Path) -> None:
    """A run of one process, killed after step 12 is told."""
    process = launch(job(packed), directory)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 12/"):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait(timeout=300)
    process.stdout.close()
    assert not (directory / "result.json").exists()
    found = checkpoint.latest(str(directory / "checkpoints"))
    assert found is not None
    assert found[0] in (10, 15)


def test_a_run_killed_in_mid_step_goes_on_with_the_same_samples_and_losses(packed: str, tmp_path: Path) -> None:
    reference = pretrain.run(job(packed), str(tmp_path / "undisturbed"), Workers())
    assert curve(reference)[-1] < 0.6 * curve(reference)[0]
    killed(packed, tmp_path / "killed")
    resumed = pretrain.run(job(packed), str(tmp_path / "killed"), Workers())
    assert curve(resumed) == pytest.approx(curve(reference), abs=1e-6)
    assert taken(tmp_path / "killed") == taken(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_run_of_one_process_killed_in_mid_step_goes_on_as_two_workers_of_the_command_line(packed: str, tmp_path: Path) -> None:
    reference = pretrain.run(job(packed), str(tmp_path / "undisturbed"), Workers())
    killed(packed, tmp_path / "killed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [launch(job(packed), tmp_path / "killed", rank, 2, port) for rank in range(2)]
    output = [process.communicate(timeout=900)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], output
    two = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert curve(two) == pytest.approx(curve(reference), abs=1e-4)
    assert taken(tmp_path / "killed") == taken(tmp_path / "undisturbed")


def test_the_samples_on_file_are_the_plan_and_their_ledger_balances(packed: str, tmp_path: Path) -> None:
    result = pretrain.run(job(packed, steps=3), str(tmp_path / "run"), Workers())
    rows = taken(tmp_path / "run")
    assert [row["step"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    assert [row["position"] for row in rows] == list(range(24))
    assert len({row["id"] for row in rows}) == 24
    assert result["samples"] == 24
    assert shards.committed_units(str(tmp_path / "run"))[0]["ledger"]["kept"] == 24


def test_accumulated_gradients_give_the_losses_of_one_large_pass(packed: str, tmp_path: Path) -> None:
    whole = pretrain.run(job(packed, steps=6), str(tmp_path / "whole"), Workers())
    cut = pretrain.run(job(packed, steps=6, micro_batch_sequences=3), str(tmp_path / "cut"), Workers())
    assert curve(cut) == pytest.approx(curve(whole), abs=1e-4)


def test_a_finished_run_is_not_trained_again(packed: str, tmp_path: Path) -> None:
    first = pretrain.run(job(packed, steps=2), str(tmp_path / "run"), Workers())
    calls: list[int] = []

    def report(done: int, *_: Any) -> bool:
        calls.append(done)
        return False

    assert pretrain.run(job(packed, steps=2), str(tmp_path / "run"), Workers(report=report)) == first
    assert not calls


def test_a_stopped_run_keeps_a_checkpoint_at_the_step_it_was_stopped(packed: str, tmp_path: Path) -> None:
    stopping = Workers(report=lambda done, total, note, metrics: done == 3)
    with pytest.raises(JobCancelled, match="stopped after step 3 of 24"):
        pretrain.run(job(packed), str(tmp_path / "run"), stopping)
    found = checkpoint.latest(str(tmp_path / "run" / "checkpoints"))
    assert found is not None
    assert found[0] == 3


def test_a_half_written_checkpoint_is_passed_over(packed: str, tmp_path: Path) -> None:
    with pytest.raises(JobCancelled):
        pretrain.run(job(packed), str(tmp_path / "run"), Workers(report=lambda done, *_: done == 12))
    newest = tmp_path / "run" / "checkpoints" / "step-00000012"
    weights = newest / "worker-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    found = checkpoint.latest(str(tmp_path / "run" / "checkpoints"))
    assert found is not None
    assert found[0] == 10


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(packed: str, tmp_path: Path, small_model: str) -> None:
    model, tokenizer = models.load(small_model), models.load_tokenizer(small_model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    models.export(model, tokenizer, str(tmp_path / "broken"))
    with pytest.raises(NonFiniteLoss, match=r"step 0: the loss is nan .*batch of sequences tokens\[\d+\], tokens\["):
        pretrain.run(job(packed, model=str(tmp_path / "broken")), str(tmp_path / "run"), Workers())


def test_the_documents_of_a_packed_row_are_found_in_its_parquet_part(tmp_path: Path) -> None:
    def row(sequence: int) -> dict[str, Any]:
        ids = [f"文档-{sequence}", f"文档-{sequence}", f"doc-{sequence}"]
        return {
            "sequence": sequence, "tokens": [1, 2, 3], "cu_seqlens": [0, 1, 2, 3], "documents": ids, "offsets": [0, 1, 0],
            "sources": ["a"] * 3, "langs": ["zh", "zh", "en"], "loss_spans": [0, 3],
        }  # fmt: skip

    directory = write_rows(tmp_path / "tokens" / "f0", "pack", [row(number) for number in range(100)], tables.TOKENS)
    assert pretrain.document_ids(directory, 73) == ["文档-73", "doc-73"]
    assert pretrain.document_ids(directory, 100) == []


def test_pretraining_goes_on_from_a_checkpoint_directory(packed: str, tmp_path: Path, small_model: str) -> None:
    result = pretrain.run(job(packed, model=small_model, steps=2), str(tmp_path / "run"), Workers())
    assert curve(result)[0] < 3.5  # a fresh model starts at log(600) = 6.4
