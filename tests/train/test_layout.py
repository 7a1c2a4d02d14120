"""Parallel layouts: what is refused, that a cut model is cut, the norm of gradients, checkpoints."""

from __future__ import annotations

import copy
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.cluster.object_store import BUCKET, Line
from tests.train import group
from tests.train.conftest import SHAPE
from tests.train.test_golden_loss import job, losses
from train import artifacts, attention, checkpoint, layout, models, pretrain
from train.errors import NonFiniteLoss
from train.parallel import Workers
from train.settings import ModelShape, ParallelSettings, PretrainJob, TrackSettings


def chosen(packed: str, world: int, sharding: str = "ddp", tensor: int = 1, **changes: Any) -> layout.Layout:
    shape = ModelShape(**{**SHAPE, **changes.pop("shape", {})})
    config = models.configuration(shape, 600, 64, 0, 3)
    return layout.choose(job(packed, sharding, tensor, model=shape, **changes), Workers(0, world), config)


def test_a_layout_that_does_not_fit_is_refused_and_those_that_do_are_named(packed: str) -> None:
    everything = (
        r"Possible with 4 workers: \{sharding: ddp, tensor: 1\}, \{sharding: fsdp2, tensor: 1\}, \{sharding: fsdp2, tensor: 2\}$"
    )
    with pytest.raises(ValueError, match=r"parallel: tensor 3 does not divide 4 workers. " + everything):
        chosen(packed, 4, tensor=3)
    with pytest.raises(ValueError, match=r"parallel: 4 does not divide the model's num_key_value_heads \(2\). " + everything):
        chosen(packed, 4, tensor=4)
    with pytest.raises(ValueError, match="with tensor 2 the 2 groups of workers need sharding fsdp2. " + everything):
        chosen(packed, 4, tensor=2)
    with pytest.raises(ValueError, match="sharding none insists on one group of workers, and there are 4"):
        chosen(packed, 4, "none")
    with pytest.raises(ValueError, match=r"batch of 2 sequences does not divide .*: \{sharding: fsdp2, tensor: 2\}$"):
        chosen(packed, 4, batch_sequences=2)
    with pytest.raises(ValueError, match=r"batch of 8 sequences does not divide .*: none with batch_sequences 8; change that"):
        chosen(packed, 3)
    experts = {"architecture": "qwen3_moe", "experts": 4, "experts_per_token": 2, "expert_intermediate": 32}
    with pytest.raises(ValueError, match="a model of type qwen3_moe has no tensor-parallel plan"):
        chosen(packed, 2, tensor=2, shape=experts)
    assert str(chosen(packed, 4, "fsdp2", 2)) == "fsdp2 2 x tensor 2"
    assert str(chosen(packed, 2, "none", 2)) == "tensor 2"
    assert str(chosen(packed, 1)) == "one worker"


def test_a_model_that_was_not_cut_is_noticed(packed: str) -> None:
    network = models.create(models.configuration(ModelShape(**SHAPE), 600, 64, 0, 3), 0)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    total = sum(sizes.values())
    for settings in ({"sharding": "fsdp2"}, {"tensor": 2}):
        place = chosen(packed, 2, **settings)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"this worker holds {total} of {total} parameters, not its share of the layout"):
            layout.verify(network, sizes, place)


def test_steps_follow_from_a_budget_in_tokens_and_one_of_both_is_given(packed: str, tmp_path: Path) -> None:
    values = {**job(packed).model_dump(mode="json"), "steps": None, "tokens": 8 * 64 * 2 + 1}
    result = pretrain.run(PretrainJob.model_validate(values), str(tmp_path / "a"), Workers())
    assert result["steps"] == 3
    for wrong in ({**values, "tokens": None}, {**values, "steps": 3}):
        with pytest.raises(ValueError, match="exactly one of `steps` and `tokens`"):
            PretrainJob.model_validate(wrong)


def test_the_norm_of_gradients_is_torchs_and_clipping_scales_by_it(packed: str) -> None:
    network = models.create(models.configuration(ModelShape(**SHAPE), 600, 64, 0, 3), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    other = copy.deepcopy(network)
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        theirs.grad = mine.grad.clone() if mine.grad is not None else None
    parameters, place = dict(network.named_parameters()), layout.Layout(Workers(), "none", 1, 1)
    norm = layout.global_norm(parameters, place)
    layout.scale_gradients(parameters, torch.clamp(1.0 / (norm + 1e-6), max=1.0))
    assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)), rel=1e-6)
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_checkpoint_is_written_while_training_goes_on_and_is_in_force_with_its_marker(
    packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, writing = threading.Event(), threading.Event()
    original = checkpoint._write

    def slow(*arguments: Any) -> dict[str, Any]:
        writing.set()
        assert allowed.wait(60)
        return original(*arguments)

    monkeypatch.setattr(checkpoint, "_write", slow)
    root = str(tmp_path / "run" / "checkpoints")
    seen: dict[int, Any] = {}

    def report(done: int, *_: Any) -> bool:
        seen[done] = checkpoint.newest(root)
        if done == 7:
            assert writing.is_set()
            allowed.set()
        return done == 12

    with pytest.raises(pretrain.JobCancelled):
        pretrain.run(job(packed, steps=20, checkpoint_every=5, keep_checkpoints=1), str(tmp_path / "run"), Workers(report=report))
    assert seen[7] is None, "training went on for two steps while the checkpoint of step 5 was being written"
    assert seen[12] is not None
    assert list(checkpoint.listing(root)) == [12]
    directory = checkpoint.listing(root)[12]
    with safe_open(f"{directory}/worker-00000.safetensors", framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert shapes["weight/model.embed_tokens.weight"] == [600, 64]
    assert shapes["optimizer/model.norm.weight/exp_avg"] == [64]
    assert not [entry for entry in Path(root).rglob("*") if entry.suffix in (".pt", ".pth", ".pkl", ".metadata")]


def test_a_checkpoint_that_cannot_be_written_stops_the_run(packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space left on device"):
        pretrain.run(job(packed, steps=20, checkpoint_every=5), str(tmp_path / "run"), Workers())
    assert checkpoint.newest(str(tmp_path / "run" / "checkpoints")) is None


def test_a_checkpoint_of_another_model_is_refused_by_name(packed: str, tmp_path: Path) -> None:
    with pytest.raises(pretrain.JobCancelled):
        pretrain.run(job(packed), str(tmp_path / "run"), Workers(report=lambda done, *_: done == 2))
    wider = job(packed, model=ModelShape(**{**SHAPE, "hidden": 96}))
    with pytest.raises(ValueError, match=r"of weight/model.embed_tokens.weight at \[0, 0\] are not in the checkpoint"):
        pretrain.run(wider, str(tmp_path / "run"), Workers())


def test_a_checkpoint_is_read_in_parts_that_were_cut_another_way(tmp_path: Path) -> None:
    whole = torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5)
    cuts = {"a": (slice(0, 4), slice(0, 2)), "b": (slice(0, 4), slice(2, 5)), "c": (slice(4, 7), slice(0, 5))}
    index: dict[str, Any] = {"workers": 3, "tensors": {"weight/w": []}}
    for name, cut in cuts.items():
        part = whole[cut].contiguous()
        box = {"shape": [7, 5], "offset": [cut[0].start, cut[1].start], "size": list(part.shape)}
        written = checkpoint._write(str(tmp_path / "step-00000001"), name, {"weight/w": part}, {"weight/w": box})
        index["tensors"]["weight/w"].append({"file": name, **written["tensors"]["weight/w"]})
    (tmp_path / "step-00000001" / checkpoint.INDEX).write_text(json.dumps(index))
    (tmp_path / "step-00000001" / checkpoint.STATE).write_text("{}")
    reader = checkpoint.Reader(str(tmp_path / "step-00000001"))
    for rows in ((0, 7), (3, 2), (5, 1), (6, 0)):
        for columns in ((0, 5), (1, 3), (4, 1)):
            offset, size = (rows[0], columns[0]), (rows[1], columns[1])
            expected = whole[rows[0] : sum(rows), columns[0] : sum(columns)]
            assert torch.equal(reader.read("weight/w", offset, size), expected)


def test_the_root_of_checkpoints_may_be_in_an_object_store(
    packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Line
) -> None:
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    settings = job(packed, steps=9, checkpoint_every=2, track=TrackSettings(tensorboard=False))
    uri = f"s3://{BUCKET}/{tmp_path.name}"
    with pytest.raises(pretrain.JobCancelled):
        pretrain.run(settings, uri, Workers(report=lambda done, *_: done == 5))
    assert sorted(checkpoint.listing(f"{uri}/checkpoints")) == [4, 5]
    found = checkpoint.newest(f"{uri}/checkpoints")
    assert found is not None
    assert artifacts.is_complete(found[1])
    resumed = pretrain.run(settings, uri, Workers())
    assert resumed["curve"] == pretrain.run(settings, str(tmp_path / "local"), Workers())["curve"]
    assert not (tmp_path / "cache").exists(), "nothing of a checkpoint is copied to this machine"


@pytest.mark.slow
def test_checkpoints_of_two_workers_go_on_with_four_in_two_dimensions_and_back(packed: str, tmp_path: Path) -> None:
    short = {"steps": 16, "checkpoint_every": 100}
    reference = pretrain.run(job(packed, **short), str(tmp_path / "reference"), Workers())
    run = tmp_path / "run"
    stages = [
        (2, job(packed, "fsdp2", **short), 4), (4, job(packed, "fsdp2", 2, **short), 8), (4, job(packed, "fsdp2", 2, **short), 10),
        (2, job(packed, tensor=2, **short), 12), (1, job(packed, **short), None),
    ]  # fmt: skip
    for world, settings, stop in stages:
        [outcome] = group.run([group.entry(settings, run, **({"stop": stop} if stop else {}))], tmp_path, world)
        assert stop is None or "JobCancelled" in outcome["error"], outcome
    assert losses(outcome) == pytest.approx(losses(reference), abs=1e-4)


def test_parallel_settings_are_operational_but_the_budget_is_not() -> None:
    from pipelines.stages.training import PretrainStage

    assert {"parallel", "compile", "activation_checkpointing", "keep_checkpoints"} <= PretrainStage.operational
    assert {"steps", "tokens", "z_loss", "precision"}.isdisjoint(PretrainStage.operational)
    assert ParallelSettings().tensor == 1


def test_compile_without_a_compiler_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"compile: torch.compile needs a C\+\+ compiler"):
        pretrain.run(job("/nowhere", compile=True), "/nowhere/run", Workers())


def test_the_curve_of_a_long_run_is_bounded_and_the_same_after_a_resume(
    packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "_CURVE_POINTS", 6)
    settings = job(packed, steps=17, checkpoint_every=100)
    whole = pretrain.run(settings, str(tmp_path / "whole"), Workers())["curve"]
    assert [point["step"] for point in whole] == [1, 4, 8, 12, 16, 17]
    with pytest.raises(pretrain.JobCancelled):
        pretrain.run(settings, str(tmp_path / "cut"), Workers(report=lambda done, *_: done == 9))
    assert pretrain.run(settings, str(tmp_path / "cut"), Workers())["curve"] == whole


def test_the_exported_model_is_an_ordinary_one(packed: str, tmp_path: Path) -> None:
    pretrain.run(job(packed, steps=2), str(tmp_path / "run"), Workers())
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["use_cache"] is True
    assert "attn_implementation" not in json.dumps(config)


def test_activation_checkpointing_computes_again_what_it_does_not_keep(
    packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"mlp": 0, "attention": 0}
    original = attention._FLASH

    def counted(*arguments: Any, **named: Any) -> Any:
        counts["attention"] += 1
        return original(*arguments, **named)

    def hook(*_: Any) -> None:
        counts["mlp"] += 1

    monkeypatch.setattr(attention, "_FLASH", counted)
    made = pretrain._placed

    def placed(*arguments: Any) -> Any:
        objective = made(*arguments)
        for block in layout.blocks(objective.network):
            block.mlp.register_forward_pre_hook(hook)
        return objective

    monkeypatch.setattr(pretrain, "_placed", placed)
    found: dict[str, dict[str, int]] = {}
    for mode in ("none", "selective", "full"):
        counts.update(mlp=0, attention=0)
        pretrain.run(job(packed, steps=1, activation_checkpointing=mode), str(tmp_path / mode), Workers())
        found[mode] = dict(counts)
    assert found["none"]["mlp"] == SHAPE["layers"]
    assert found["full"] == {name: 2 * count for name, count in found["none"].items()}
    assert found["selective"] == {"mlp": 2 * found["none"]["mlp"], "attention": found["none"]["attention"]}


def test_a_checkpoint_in_the_writing_is_put_in_force_when_the_loss_is_not_finite(
    packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint._write

    def slow(*arguments: Any) -> dict[str, Any]:
        time.sleep(1)
        return original(*arguments)

    monkeypatch.setattr(checkpoint, "_write", slow)
    broken = layout.global_norm
    norms: list[float] = []

    def norm(*arguments: Any) -> torch.Tensor:
        norms.append(0.0)
        return broken(*arguments) * (float("inf") if len(norms) == 7 else 1.0)

    monkeypatch.setattr(layout, "global_norm", norm)
    with pytest.raises(NonFiniteLoss, match=r"step 6: .* the norm of the gradient inf"):
        pretrain.run(job(packed, checkpoint_every=5), str(tmp_path / "run"), Workers())
    found = checkpoint.newest(str(tmp_path / "run" / "checkpoints"))
    assert found is not None
    assert found[0] == 5
