"""One loop, one curve: every parallel layout of a tiny model gives the losses of one process, over 50 steps, to 1e-4."""

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


def test_two_workers_under_ddp_fsdp2_and_tensor_parallelism_have_the_losses_of_one(
    packed: str, golden: dict[str, Any], tmp_path: Path
) -> None:
    plan = {
        "ddp 2": job(packed, micro_batch_sequences=2),
        "fsdp2 2": job(packed, "fsdp2", activation_checkpointing="full"),
        "tensor 2": job(packed, tensor=2),
    }
    results = group.run([group.entry(one, tmp_path / name) for name, one in plan.items()], tmp_path, 2)
    assert losses(golden)[-1] < 0.5 * losses(golden)[0]
    for (name, _), result in zip(plan.items(), results, strict=True):
        assert result["timings"]["layout"] == name
        assert losses(result) == pytest.approx(losses(golden), abs=1e-4), name
        assert norms(result) == pytest.approx(norms(golden), rel=2e-3), name
        assert result["parameters"] == golden["parameters"]


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
