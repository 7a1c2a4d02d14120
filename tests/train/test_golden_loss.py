"""One loop, one curve: every parallel layout of a tiny model gives the losses of one process, over 50 steps, to 1e-4.

Checkpoints that go from one layout to another are here, too: one group of two workers does both plans.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.train import group
from tests.train.conftest import SHAPE
from train import pretrain
from train.parallel import Workers
from train.settings import ModelShape, ParallelSettings, PretrainJob, RowsInput

STEPS = 50


def job(packed: str, sharding: str = "ddp", tensor: int = 1, **changes: Any) -> PretrainJob:
    values = {
        "inputs": [RowsInput(name="tokens", directory=packed)], "model": ModelShape(**SHAPE), "steps": STEPS,
        "learning_rate": 5e-3, "checkpoint_every": 1000, "z_loss": 1e-4,
        "parallel": ParallelSettings(sharding=sharding, tensor=tensor),
    }  # fmt: skip
    return PretrainJob(**{**values, **changes})


def losses(result: dict[str, Any]) -> list[float]:
    assert "error" not in result, result
    return [point["loss"] for point in result["curve"]]


def norms(result: dict[str, Any]) -> list[float]:
    return [point["gradient_norm"] for point in result["curve"]]


@pytest.fixture(scope="module")
def golden(packed: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return pretrain.run(job(packed), str(tmp_path_factory.mktemp("golden") / "one"), Workers())


SHORT = {"steps": 12, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def pair(packed: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What one group of two workers made: its directory, and what was said of each job.

    The three layouts; then FSDP2 stopped at step 6 goes on under FSDP2, and under tensor parallelism and back; then a
    checkpoint of one process goes on under tensor parallelism.
    """
    out = tmp_path_factory.mktemp("pair")
    fsdp, tensor, alone = job(packed, "fsdp2", **SHORT), job(packed, tensor=2, **SHORT), job(packed, **SHORT)
    with pytest.raises(pretrain.JobCancelled):
        pretrain.run(alone, str(out / "from-one"), Workers(report=lambda done, *_: done == 6))
    plan = [
        group.entry(job(packed, micro_batch_sequences=2), out / "ddp 2"),
        group.entry(job(packed, "fsdp2", activation_checkpointing="full"), out / "fsdp2 2"),
        group.entry(job(packed, tensor=2), out / "tensor 2"),
        group.entry(fsdp, out / "undisturbed"),
        group.entry(fsdp, out / "stopped", stop=6),
        group.entry(fsdp, out / "stopped"),
        group.entry(fsdp, out / "fsdp-to-tensor", stop=6),
        group.entry(tensor, out / "fsdp-to-tensor", stop=9),
        group.entry(fsdp, out / "fsdp-to-tensor", stop=10),
        group.entry(tensor, out / "from-one", stop=9),
    ]
    return out, group.run(plan, out, 2)


def test_two_workers_under_ddp_fsdp2_and_tensor_parallelism_have_the_losses_of_one(
    golden: dict[str, Any], pair: tuple[Path, list[dict[str, Any]]]
) -> None:
    assert losses(golden)[-1] < 0.5 * losses(golden)[0]
    for name, result in zip(("ddp 2", "fsdp2 2", "tensor 2"), pair[1][:3], strict=True):
        assert result["timings"]["layout"] == name
        assert losses(result) == pytest.approx(losses(golden), abs=1e-4), name
        assert norms(result) == pytest.approx(norms(golden), rel=2e-3), name
        assert result["parameters"] == golden["parameters"]


def test_checkpoints_go_from_one_layout_to_another_and_are_bit_exact_on_the_same(
    packed: str, pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    out, (undisturbed, _, again, *rest) = pair[0], pair[1][3:]
    alone = job(packed, **SHORT)
    reference = pretrain.run(alone, str(tmp_path / "reference"), Workers())
    assert all("JobCancelled" in outcome["error"] for outcome in rest), rest
    assert again["curve"] == undisturbed["curve"]
    weights = [out / name / "model" / "model.safetensors" for name in ("undisturbed", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for name in ("fsdp-to-tensor", "from-one"):
        files = sorted((out / name / "checkpoints").glob("step-*/worker-*.safetensors"))
        assert len(files) == 4, "two checkpoints are kept, each written by two workers"
        sizes = [file.stat().st_size for file in files[-2:]]
        assert max(sizes) < 1.2 * min(sizes), "both workers write about as much"
        result = pretrain.run(alone, str(out / name), Workers())
        assert losses(result) == pytest.approx(losses(reference), abs=1e-4)
        assert not (out / name / "checkpoints").exists()


@pytest.mark.slow
def test_accumulation_and_activation_checkpointing_change_no_loss_under_any_layout(
    packed: str, golden: dict[str, Any], tmp_path: Path
) -> None:
    plan = [
        job(packed, *place, micro_batch_sequences=3, activation_checkpointing=mode)
        for place, mode in ((("ddp", 1), "selective"), (("fsdp2", 1), "selective"), (("ddp", 2), "selective"), (("ddp", 2), "full"))
    ]
    for result in group.run([group.entry(one, tmp_path / f"{n}") for n, one in enumerate(plan)], tmp_path, 2):
        assert losses(result) == pytest.approx(losses(golden), abs=1e-4)
        assert norms(result) == pytest.approx(norms(golden), rel=2e-3)


@pytest.mark.slow
def test_four_workers_as_two_by_two_have_the_losses_of_one(packed: str, golden: dict[str, Any], tmp_path: Path) -> None:
    plan = [
        job(packed, "fsdp2", 2),
        job(packed, "fsdp2", 2, micro_batch_sequences=1, activation_checkpointing="full"),
        job(packed, "fsdp2"),
    ]
    results = group.run([group.entry(one, tmp_path / f"{n}") for n, one in enumerate(plan)], tmp_path, 4)
    assert [result["timings"]["layout"] for result in results] == ["fsdp2 2 x tensor 2"] * 2 + ["fsdp2 4"]
    for result in results:
        assert losses(result) == pytest.approx(losses(golden), abs=1e-4)
        assert norms(result) == pytest.approx(norms(golden), rel=2e-3)


SHAPES = {
    "qwen3": {"architecture": "qwen3"},
    "untied": {"tie_embeddings": False, "vocab": 601},
    "experts": {"architecture": "qwen3_moe", "experts": 4, "experts_per_token": 2, "expert_intermediate": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_have_the_losses_of_one_process_under_every_layout(name: str, packed: str, tmp_path: Path) -> None:
    shape = ModelShape(**{**SHAPE, **SHAPES[name]})
    alone = pretrain.run(job(packed, model=shape), str(tmp_path / "one"), Workers())
    layouts = [("fsdp2", 1), ("ddp", 2)] if name != "experts" else [("fsdp2", 1), ("ddp", 1)]
    plan = [job(packed, sharding, tensor, model=shape) for sharding, tensor in layouts]
    results = group.run([group.entry(one, tmp_path / f"{n}") for n, one in enumerate(plan)], tmp_path, 2)
    # The balance of experts is that of a forward pass, so it is another one where the batch is cut another way.
    for result in results:
        assert losses(result) == pytest.approx(losses(alone), abs=1e-4 if name != "experts" else 2e-2)
    if name == "experts":
        assert all(point["expert_load_max"] >= 1 >= point["expert_load_min"] for point in results[0]["curve"])


@pytest.mark.slow
@pytest.mark.parametrize("activation_checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_have_the_losses_of_plain_ones(
    activation_checkpointing: str, packed: str, golden: dict[str, Any], tmp_path: Path
) -> None:
    compiled = {"compile": True, "activation_checkpointing": activation_checkpointing}
    torch._dynamo.reset()
    counters["stats"].clear()
    alone = pretrain.run(job(packed, **compiled), str(tmp_path / "one"), Workers())
    assert counters["stats"]["unique_graphs"] > 0
    assert losses(alone) == pytest.approx(losses(golden), abs=1e-4)
    plan = [job(packed, **compiled), job(packed, "fsdp2", **compiled), job(packed, tensor=2, **compiled)]
    for result in group.run([group.entry(one, tmp_path / f"{n}") for n, one in enumerate(plan)], tmp_path, 2):
        assert losses(result) == pytest.approx(losses(golden), abs=1e-4)


@pytest.mark.slow
def test_bf16_products_fall_like_fp32_under_every_layout(packed: str, golden: dict[str, Any], tmp_path: Path) -> None:
    plan = [job(packed, *layout, precision="bf16") for layout in (("ddp", 1), ("fsdp2", 1), ("ddp", 2))]
    for result in group.run([group.entry(one, tmp_path / f"{n}") for n, one in enumerate(plan)], tmp_path, 2):
        assert losses(result) == pytest.approx(losses(golden), abs=0.05)
        assert losses(result) != losses(golden)
