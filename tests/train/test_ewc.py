"""Elastic weight consolidation: the Fisher diagonal against brute force, the penalty against autograd, alone and on two workers."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.train.conftest import SHAPE
from train import ewc, fisher, jobs, models, pretrain, sft
from train.errors import JobCancelled
from train.parallel import Workers
from train.settings import EwcTerm, ModelShape, PretrainJob, RowsInput
from train.settings_finetune import LoraSettings, SftJob
from train.settings_fisher import FisherJob


def fisher_job(model: str, *directories: str, **changes: Any) -> FisherJob:
    inputs = [RowsInput(name=f"input-{number}", directory=directory) for number, directory in enumerate(directories)]
    return FisherJob(**{"model": model, "inputs": inputs, "sequences": 24, "max_length": 64, "checkpoint_every": 8, **changes})


@pytest.fixture(scope="module")
def diagonal(small_model: str, packed: str, chats: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Fisher diagonal over packed rows, conversations and documents."""
    directory = tmp_path_factory.mktemp("run") / "fisher" / "f0"
    torch.set_num_threads(1)
    fisher.run(fisher_job(small_model, packed, chats, corpus), str(directory), Workers())
    return str(directory / "fisher")


def toy(directory: Path, anchor: dict[str, torch.Tensor], curvature: dict[str, torch.Tensor]) -> str:
    """A Fisher diagonal of these numbers, taken at a `model` of these weights."""
    model = directory / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    save_file(anchor, model / "model.safetensors")
    description = {"anchor": str(model), "anchor_digest": ewc.weights_digest(str(model)), "tasks": []}
    ewc.write(str(directory / "fisher"), curvature, description)
    return str(directory / "fisher")


class Point(torch.nn.Module):
    """A model that is one vector and one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(5))
        self.matrix = torch.nn.Parameter(torch.zeros(2, 3))


# ---- the penalty


def test_two_quadratic_tasks_settle_where_the_sum_of_both_is_least(tmp_path: Path) -> None:
    """A new task h/2 (theta - b)^2 and EWC to an old one: the fixed point is (h b + s F a) / (h + s F), weight by weight."""
    draw = torch.Generator().manual_seed(1)
    a, b, h = (torch.rand(5, generator=draw) + 0.1 for _ in range(3))
    importance = torch.tensor([0.0, 0.01, 0.5, 2.0, 40.0])
    path = toy(tmp_path, {"theta": a, "matrix": torch.zeros(2, 3)}, {"theta": importance, "matrix": torch.ones(2, 3)})
    model = Point()
    penalty = ewc.Ewc([EwcTerm(fisher=path, strength=3.0)], "", model, Workers())
    for _ in range(4000):
        model.zero_grad()
        (h / 2 * (model.theta - b).square()).sum().backward()
        penalty(dict(model.named_parameters()))
        with torch.no_grad():
            model.theta -= 0.01 * model.theta.grad  # type: ignore[operator]
    expected = (h * b + 3.0 * importance * a) / (h + 3.0 * importance)
    torch.testing.assert_close(model.theta.detach(), expected, atol=1e-5, rtol=1e-5)
    assert (model.theta.detach() - a).abs()[4] < 0.05 * (a - b).abs()[4] + 1e-3  # what matters stayed
    assert model.theta.detach()[0] == pytest.approx(float(b[0]), abs=1e-5)  # what does not went


def test_several_penalties_have_the_value_and_gradient_of_their_sum(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    terms, anchors, importances = [], [], []
    for number, strength in enumerate((0.3, 2.0, 11.0)):
        anchors.append({"theta": torch.randn(5, generator=draw), "matrix": torch.randn(2, 3, generator=draw)})
        importances.append({"theta": torch.rand(5, generator=draw), "matrix": torch.rand(2, 3, generator=draw)})
        importances[-1]["theta"][0] = 0.0  # no task cares about the first weight
        terms.append(EwcTerm(fisher=toy(tmp_path / str(number), anchors[-1], importances[-1]), strength=strength))
    model = Point()
    with torch.no_grad():
        model.theta.copy_(torch.randn(5, generator=draw))
    parameters = dict(model.named_parameters())
    expected = sum(
        term.strength / 2 * (importance[name] * (parameters[name] - anchor[name]).square()).sum()
        for term, anchor, importance in zip(terms, anchors, importances, strict=True)
        for name in parameters
    )
    gradients = torch.autograd.grad(expected, list(parameters.values()))  # type: ignore[arg-type]
    before = torch.randn(5, generator=draw)
    model.theta.grad = before.clone()  # the task's own gradient, which is added to
    value = ewc.Ewc(terms, "", model, Workers())(parameters)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(model.theta.grad - before, gradients[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.matrix.grad, gradients[1], atol=1e-5, rtol=1e-5)


def test_the_penalty_on_adapters_is_that_on_the_merged_weights(small_model: str, diagonal: str, tmp_path: Path) -> None:
    """LoRA on a base that has moved away from the anchor: value and gradients by autograd through anchor + offset + s B A."""
    moved = models.load(small_model)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))
    models.export(moved, models.load_tokenizer(small_model), str(tmp_path / "moved"))
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(models.load(str(tmp_path / "moved")), config)
    parameters = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    anchor = dict(models.load(small_model).named_parameters())
    importance = load_file(Path(diagonal) / ewc.FILE)
    base = dict(models.load(str(tmp_path / "moved")).named_parameters())
    expected = torch.zeros(())
    for name in parameters:
        if ".lora_A." in name:
            other = parameters[name.replace(".lora_A.", ".lora_B.")]
            weight = name.removeprefix("base_model.model.").split(".lora_A.")[0] + ".weight"
            merged = base[weight].detach() + 12 / 4 * other @ parameters[name]
            expected = expected + 5.0 / 2 * (importance[weight] * (merged - anchor[weight].detach()).square()).sum()
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    terms = [EwcTerm(fisher=diagonal, strength=5.0)]
    value = ewc.Ewc(terms, str(tmp_path / "moved"), adapted, Workers())(parameters)
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_what_ewc_cannot_do_is_refused(small_model: str, diagonal: str, tmp_path: Path) -> None:
    terms = [EwcTerm(fisher=diagonal, strength=1.0)]
    dora = get_peft_model(models.load(small_model), LoraConfig(r=2, use_dora=True, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"ewc does not work with lora\.dora"):
        ewc.Ewc(terms, small_model, dora, Workers())
    with pytest.raises(FileNotFoundError, match="no Fisher diagonal at"):
        ewc.Ewc([EwcTerm(fisher=str(tmp_path), strength=1.0)], small_model, models.load(small_model), Workers())
    point = Point()
    penalty = ewc.Ewc(terms, small_model, point, Workers())
    with pytest.raises(ValueError, match=r"'theta' is trained, but .* has no such weight"):
        penalty(dict(point.named_parameters()))
    path = toy(tmp_path / "toy", {"theta": torch.zeros(5)}, {"theta": torch.ones(5)})
    save_file({"theta": torch.ones(5)}, tmp_path / "toy" / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"taken at other weights than .* run the fisher stage again"):
        ewc.Ewc([EwcTerm(fisher=path, strength=1.0)], "", Point(), Workers())


# ---- the Fisher information


def test_the_diagonal_is_the_mean_of_squared_gradients_sequence_by_sequence(small_model: str, corpus: str, tmp_path: Path) -> None:
    """Observed labels, documents: against torch.autograd on each text by itself."""
    job = fisher_job(small_model, corpus, labels="observed", sequences=6)
    result = fisher.run(job, str(tmp_path / "run"), Workers())
    model, tokenizer = models.load(small_model), models.load_tokenizer(small_model)
    drawn, _ = fisher.draw(job)
    sequences, _ = fisher.read(job, drawn, np.arange(6), model, tokenizer)
    parameters = dict(model.named_parameters())
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for sequence in sequences.values():
        ids = torch.from_numpy(sequence.input_ids)[None]
        assert ids[0, -1] == tokenizer.eos_token_id or len(ids[0]) == 64
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        likelihood = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        for name, gradient in zip(parameters, torch.autograd.grad(likelihood, list(parameters.values())), strict=True):
            expected[name] += gradient.square() / 6
    mean = sum(float(value.sum()) for value in expected.values()) / sum(value.numel() for value in expected.values())
    found = load_file(tmp_path / "run" / "fisher" / ewc.FILE)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value / mean, atol=1e-3, rtol=1e-3, msg=name)
    assert result["mean"] == pytest.approx(mean, rel=1e-4)
    whole = torch.cat([value.flatten() for value in found.values()]).double()
    assert float(whole.mean()) == pytest.approx(1.0, rel=1e-5)
    assert result["concentration"]["largest_10%"] == pytest.approx(
        float(whole.sort(descending=True).values[: len(whole) // 10].sum() / whole.sum()), abs=0.03
    )


def test_sampled_labels_follow_the_model_and_give_its_fisher_information() -> None:
    """One softmax of four classes: mean squared score over many draws = the Fisher diagonal, which is p (1 - p)."""
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0]).expand(20_000, 4)
    drawn = fisher.sampled(logits, seed=7, number=3)
    assert torch.equal(drawn, fisher.sampled(logits, seed=7, number=3))
    assert not torch.equal(drawn, fisher.sampled(logits, seed=7, number=4))
    probability = logits[0].softmax(-1)
    scores = torch.nn.functional.one_hot(drawn, 4) - probability
    torch.testing.assert_close(scores.square().mean(dim=0), probability * (1 - probability), atol=0.01, rtol=0.05)


def test_an_interrupted_estimate_goes_on_and_a_finished_one_is_not_done_again(
    small_model: str, packed: str, chats: str, corpus: str, diagonal: str, tmp_path: Path
) -> None:
    job = fisher_job(small_model, packed, chats, corpus, checkpoint_every=16)
    with pytest.raises(JobCancelled, match="stopped after sequence 10 of 24"):
        fisher.run(job, str(tmp_path / "run"), Workers(report=lambda done, *_: done == 10))
    result = fisher.run(job, str(tmp_path / "run"), Workers())
    found, expected = load_file(tmp_path / "run" / "fisher" / ewc.FILE), load_file(Path(diagonal) / ewc.FILE)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    assert (result["sequences"], result["samples"]) == (24, 24)
    assert fisher.run(job, str(tmp_path / "run"), Workers(report=lambda *_: pytest.fail("done again"))) == result
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_tasks_accumulate_with_decay_and_the_newest_model_is_the_anchor(
    small_model: str, chats: str, corpus: str, diagonal: str, tmp_path: Path
) -> None:
    alone = fisher_job(small_model, chats, sequences=5)
    fisher.run(alone, str(tmp_path / "alone"), Workers())
    job = alone.model_copy(update={"previous": diagonal, "decay": 0.25})
    fisher.run(job, str(tmp_path / "both"), Workers())
    before, own, both = (
        load_file(Path(path) / ewc.FILE) for path in (diagonal, tmp_path / "alone/fisher", tmp_path / "both/fisher")
    )
    for name, value in both.items():
        torch.testing.assert_close(value, own[name] + 0.25 * before[name], atol=1e-6, rtol=1e-5)
    description = json.loads((tmp_path / "both" / "fisher" / ewc.DESCRIPTION).read_text())
    assert [task["factor"] for task in description["tasks"]] == [0.25, 1.0]
    assert description["anchor"] == small_model


def test_no_sequence_is_used_twice(small_model: str, packed: str, chats: str) -> None:
    job = fisher_job(small_model, packed, chats, sequences=10_000)
    drawn, mixture = fisher.draw(job)
    pairs = set(zip(drawn.source.tolist(), drawn.row.tolist(), strict=True))
    assert len(pairs) == len(drawn.row) >= 2 * 60 - 4
    assert mixture.names == ["input-0", "input-1"]


# ---- in training


def penalties(result: dict[str, Any]) -> list[float]:
    return [point["ewc_penalty"] for point in result["curve"]]


def finetune(small_model: str, chats: str, **changes: Any) -> SftJob:
    values = {
        "model": small_model, "inputs": [RowsInput(name="chats", directory=chats)], "steps": 4, "learning_rate": 5e-3,
        "max_length": 64, "batch_examples": 4,
    }  # fmt: skip
    return SftJob(**{**values, **changes})


def continued(small_model: str, packed: str, **changes: Any) -> PretrainJob:
    values = {
        "model": small_model, "inputs": [RowsInput(name="tokens", directory=packed)], "steps": 4, "learning_rate": 5e-3,
        "batch_sequences": 4,
    }  # fmt: skip
    return PretrainJob(**{**values, **changes})


def distance(model: str, anchor: str, diagonal: str) -> float:
    importance = load_file(Path(diagonal) / ewc.FILE)
    before = dict(models.load(anchor).named_parameters())
    after = dict(models.load(model).named_parameters())
    return sum(float((importance[name] * (after[name] - value).square()).sum()) for name, value in before.items())


@pytest.mark.parametrize("kind", ["sft", "lora", "pretrain"])
def test_a_stronger_penalty_keeps_the_model_nearer(
    kind: str, small_model: str, packed: str, chats: str, diagonal: str, tmp_path: Path
) -> None:
    moved = []
    for strength in (None, 1e4):
        terms = [] if strength is None else [EwcTerm(fisher=diagonal, strength=strength)]
        directory = tmp_path / str(strength)
        if kind == "pretrain":
            result = pretrain.run(continued(small_model, packed, ewc=terms), str(directory), Workers())
        else:
            lora = LoraSettings(rank=4) if kind == "lora" else None
            result = sft.run(finetune(small_model, chats, ewc=terms, lora=lora), str(directory), Workers())
        moved.append(distance(str(directory / "model"), small_model, diagonal))
        if strength is None:
            assert "ewc_penalty" not in result["curve"][0]
        else:
            assert penalties(result)[0] == pytest.approx(0.0, abs=1e-9)
            assert min(penalties(result)[1:]) > 0
    assert moved[1] < 0.7 * moved[0]


def test_a_model_from_scratch_has_nothing_to_be_held_to(packed: str, diagonal: str, small_model: str, tmp_path: Path) -> None:
    """EWC on another shape is refused, with the weight that does not fit."""
    terms = [EwcTerm(fisher=diagonal, strength=1.0)]
    other = ModelShape(**{**SHAPE, "intermediate": 192})
    with pytest.raises(ValueError, match=r"ewc: '.*mlp.*' is trained with shape \((192, 64|64, 192)\), but not in"):
        pretrain.run(continued(small_model, packed, model=other, ewc=terms), str(tmp_path / "run"), Workers())


def _worker(rank: int, world: int, port: int, plan: list[dict[str, Any]], scratch: str) -> None:
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    )
    torch.set_num_threads(1)
    workers = Workers.here()
    for number, entry in enumerate(plan):
        settings, run = jobs.load(entry["kind"])
        result = run(settings(**entry["job"]), entry["directory"], workers)
        if workers.first:
            (Path(scratch) / f"{number}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def on_two(plan: list[tuple[str, Any, str]], scratch: Path) -> list[dict[str, Any]]:
    """The results of jobs that two gloo processes do one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    entries = [{"kind": kind, "job": job.model_dump(mode="json"), "directory": directory} for kind, job, directory in plan]
    multiprocessing.spawn(_worker, (2, port, entries, str(scratch)), nprocs=2)  # type: ignore[no-untyped-call]
    return [json.loads((scratch / f"{number}.json").read_text()) for number in range(len(plan))]


@pytest.mark.slow
def test_two_workers_find_the_same_diagonal_and_the_same_penalties(
    small_model: str, packed: str, chats: str, corpus: str, diagonal: str, tmp_path: Path
) -> None:
    """Fisher shared out; EWC under DDP, FSDP2 and tensor parallelism, with and without LoRA: as one process has it."""
    terms = [EwcTerm(fisher=diagonal, strength=300.0)]
    one = {
        "full": sft.run(finetune(small_model, chats, ewc=terms), str(tmp_path / "one-full"), Workers()),
        "lora": sft.run(finetune(small_model, chats, ewc=terms, lora=LoraSettings(rank=4)), str(tmp_path / "one-lora"), Workers()),
        "pretrain": pretrain.run(continued(small_model, packed, ewc=terms), str(tmp_path / "one-pretrain"), Workers()),
    }
    plan: list[tuple[str, Any, str]] = [("fisher", fisher_job(small_model, packed, chats, corpus), str(tmp_path / "fisher"))]
    expected = []
    for sharding in ("ddp", "fsdp2"):
        for name, lora in (("full", None), ("lora", LoraSettings(rank=4))):
            job = finetune(small_model, chats, ewc=terms, lora=lora, sharding=sharding)
            plan.append(("sft", job, str(tmp_path / f"{sharding}-{name}")))
            expected.append(one[name])
    for parallel in ({"sharding": "fsdp2"}, {"tensor": 2}):
        job = continued(small_model, packed, ewc=terms, parallel=parallel)
        plan.append(("pretrain", job, str(tmp_path / f"pretrain-{len(plan)}")))
        expected.append(one["pretrain"])
    result, *trained = on_two(plan, tmp_path)

    assert (result["sequences"], result["samples"]) == (24, 24)
    found, alone = load_file(tmp_path / "fisher" / "fisher" / ewc.FILE), load_file(Path(diagonal) / ewc.FILE)
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)
    for (_, _, directory), outcome, reference in zip(plan[1:], trained, expected, strict=True):
        assert penalties(outcome) == pytest.approx(penalties(reference), rel=2e-3, abs=1e-6), directory
        losses = [point["loss"] for point in reference["curve"]]
        assert [point["loss"] for point in outcome["curve"]] == pytest.approx(losses, abs=1e-3), directory
