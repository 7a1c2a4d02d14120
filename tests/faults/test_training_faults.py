"""Training that is killed, and goes on: the samples that workers really read are the undisturbed ones, in order, to the row."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import group
from tests.train.conftest import SHAPE, bpe, packed, small_model  # noqa: F401  fixtures
from train import checkpoint, models, pretrain
from train.parallel import Workers
from train.settings import ModelShape, ParallelSettings, PretrainJob, RowsInput

STEPS = 24


def job(packed: str, sharding: str = "ddp", tensor: int = 1, **changes: Any) -> PretrainJob:  # noqa: F811
    values = {
        "inputs": [RowsInput(name="tokens", directory=packed)], "model": ModelShape(**SHAPE), "steps": STEPS,
        "learning_rate": 5e-3, "checkpoint_every": 4, "parallel": ParallelSettings(sharding=sharding, tensor=tensor),
    }  # fmt: skip
    return PretrainJob(**{**values, **changes})


def kill_at(settings: PretrainJob, directory: Path, world: int, step: int, rank: int) -> None:
    """Start a group and kill -9 one worker once a step is reported; the others end with it, as torchrun would have it."""
    processes = group.start([group.entry(settings, directory)], directory.parent, world)
    stream = processes[0].stdout
    assert stream is not None
    told = []
    for line in stream:
        told.append(line)
        if line.startswith(f"step {step}/"):
            os.kill(processes[rank].pid, signal.SIGKILL)
            break
    else:
        pytest.fail("".join(told))
    for process in processes:
        process.kill()
        process.communicate(timeout=60)


def rows_by_step(directory: Path, world: int) -> dict[int, list[list[Any]]]:
    """The rows of each step in order of rank, of the last time that the step was taken."""
    found: dict[int, dict[int, list[list[Any]]]] = {}
    for batch in group.reads(directory, world):
        found.setdefault(batch["step"], {})[batch["rank"]] = batch["rows"]
    return {step: [row for rank in sorted(ranks) for row in ranks[rank]] for step, ranks in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_workers_killed_in_mid_run_go_on_as_one_two_or_four_with_the_samples_of_an_undisturbed_run(
    sharding: str,
    packed: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    undisturbed = tmp_path / "undisturbed"
    [reference] = group.run([group.entry(job(packed), undisturbed)], tmp_path, 1)
    planned = rows_by_step(undisturbed, 1)
    assert sorted(planned) == list(range(STEPS))

    killed = tmp_path / "killed"
    kill_at(job(packed, sharding), killed, 2, 11, rank=1)
    found = checkpoint.newest(str(killed / "checkpoints"))
    assert found is not None
    assert found[0] in (4, 8)
    before = rows_by_step(killed, 2)
    for world, layout in ((2, (sharding, 1)), (1, ("ddp", 1)), (4, (sharding, 1)), (4, ("fsdp2", 2))):
        again = tmp_path / f"again-{world}-{layout[0]}-{layout[1]}"
        shutil.copytree(killed, again)
        [result] = group.run([group.entry(job(packed, *layout), again)], tmp_path, world)
        after = rows_by_step(again, world)
        if layout[1] == 2:  # workers that share products read the same
            after = {step: [*rows[:4], *rows[8:12]] for step, rows in after.items()}
        assert sorted(after) == list(range(found[0], STEPS))
        assert {step: before[step] for step in range(found[0])} | after == planned
        losses = [[point["loss"] for point in one["curve"]] for one in (result, reference)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [("ddp", 1), ("fsdp2", 1), ("ddp", 2)])
def test_a_loss_that_is_not_finite_names_rows_and_documents_under_every_layout(
    layout: tuple[str, int],
    packed: str,  # noqa: F811
    small_model: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    model, tokenizer = models.load(small_model), models.load_tokenizer(small_model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    models.export(model, tokenizer, str(tmp_path / "broken"))
    settings = job(packed, *layout, model=str(tmp_path / "broken"))
    [outcome] = group.run([group.entry(settings, tmp_path / "run")], tmp_path, 2)
    assert outcome["error"].startswith("NonFiniteLoss: step 0: the loss is nan")
    first, _ = pretrain._open(settings)
    draw = first.locate(list(range(8)))
    for row in draw.row.tolist():
        assert f"tokens[{row}]" in outcome["error"]


@pytest.mark.slow
def test_a_worker_killed_while_it_writes_a_checkpoint_leaves_the_one_before_in_force(packed: str, tmp_path: Path) -> None:  # noqa: F811
    """The write of step 8 never ends on the second worker; both are killed; nothing but step 4 is taken up again."""
    run = tmp_path / "run"
    processes = group.start([group.entry(job(packed, "fsdp2"), run, hang_write=8)], tmp_path, 2)
    stream = processes[0].stdout
    assert stream is not None
    for line in stream:
        if line.startswith("step 11/"):
            break
    for process in processes:
        process.kill()
        process.communicate(timeout=60)
    assert (run / "checkpoints" / "step-00000008" / "worker-00000.safetensors").exists()
    found = checkpoint.newest(str(run / "checkpoints"))
    assert found is not None
    assert found[0] == 4
    [result] = group.run([group.entry(job(packed, "fsdp2"), run)], tmp_path, 2)
    reference = pretrain.run(job(packed), str(tmp_path / "reference"), Workers())
    losses = [[point["loss"] for point in one["curve"]] for one in (result, reference)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert json.loads((run / "result.json").read_text())["steps"] == STEPS
