"""The shared room of fine-tuning: how long, in which order and layout, with which penalties, and that a run goes on exactly."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples_of
from hypothesis import strategies as st
from peft import PeftModel
from pydantic import ValidationError

from operators import tables
from operators.tokens import holdout
from pipelines.stages.conversations import ConversationsStage
from tests.train.conftest import conversations, write_rows
from tests.train.test_pretrain import taken
from tests.train.test_sft import job
from train import batches, checkpoint, finetune, models, sft
from train.errors import JobCancelled
from train.loader import IGNORE
from train.parallel import Workers
from train.settings import RowsInput
from train.settings_finetune import LoraSettings, SftJob


def losses(result: dict[str, Any]) -> list[float]:
    return [point["loss"] for point in result["curve"]]


def examples(sizes: list[int]) -> finetune.Examples:
    ids = [pa.array([f"{n}-{row}" for row in range(size)]) for n, size in enumerate(sizes)]
    return finetune.Examples(pa.table({}), ids, [np.full(size, 10) for size in sizes], {})


def plain(model: str, chats: str, **changes: Any) -> SftJob:
    """One input, all weights, few steps."""
    return job(
        model, chats, chats, **{"inputs": [RowsInput(name="chats", directory=chats)], "lora": None, "learning_rate": 1e-3} | changes
    )


# how long


def test_epochs_become_steps_once_the_examples_are_counted() -> None:
    inputs = [RowsInput(name="domain", directory="/d", weight=0.8), RowsInput(name="general", directory="/g", weight=0.2)]
    told = job("m", "", "", inputs=inputs, steps=None, epochs=3, batch_examples=8)
    made = finetune.settled(told, examples([100, 50]))
    # Three passes over 100 examples of the domain are four fifths of 375 samples, 46.9 batches of 8.
    assert (made.steps, made.epochs) == (47, None)
    planned = finetune.plan(made, examples([100, 50]), examples([100, 50]).mixture(made))
    assert planned["samples"] == 376
    assert planned["tokens"] == 3760
    assert planned["epochs"] == pytest.approx(3.0, abs=0.02)
    assert planned["mixture"]["general"] == {"samples": 75, "tokens": 750, "examples": 50, "epochs": 1.5}
    assert finetune.announcement(made, planned).startswith("47 steps of 8 = 3")
    assert finetune.settled(told.model_copy(update={"most_steps": 5}), examples([100, 50])).steps == 5


def test_exactly_one_of_steps_and_epochs_is_wanted() -> None:
    for wrong in ({"steps": None}, {"epochs": 1.0}):
        with pytest.raises(ValidationError, match="exactly one of `steps` and `epochs`"):
            job("m", "", "", **wrong)
    with pytest.raises(ValidationError, match="`patience` needs `held_out`"):
        job("m", "", "", patience=2)


def test_the_plan_is_told_before_the_first_step(small_model: str, chats: str, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []

    def report(done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
        told.append((done, total, note))
        return False

    result = sft.run(plain(small_model, chats, steps=None, epochs=0.25), str(tmp_path / "run"), Workers(report=report))
    assert told[0] == (0, 2, "2 steps of 8 = 0.2667 epochs: 16 samples of 60 examples, " + told[0][2].split("examples, ")[1])
    assert [done for done, _, _ in told] == [0, 1, 2]
    assert (result["epochs"], result["examples"], result["samples"], result["steps"]) == (0.2667, 60, 16, 2)


# in which layout


@examples_of(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 64), min_size=1, max_size=40),
    world=st.integers(1, 4),
    rows=st.one_of(st.none(), st.integers(1, 5)),
    packed=st.booleans(),
)
def test_every_example_is_in_one_pass_and_all_workers_do_as_many(
    lengths: list[int], world: int, rows: int | None, packed: bool
) -> None:
    made = batches.arrange(np.array(lengths), world, rows, 64 if packed else None)
    assert sorted(index for worker in made for part in worker for row in part for index in row) == list(range(len(lengths)))
    assert len(made) == world
    assert {tuple(len(part) for part in worker) for worker in made} == {tuple(len(part) for part in made[0])}
    assert all(sum(lengths[index] for index in row) <= 64 for worker in made for part in worker for row in part)
    if rows is not None:
        assert all(len(part) <= rows for part in made[0])
    if not packed:
        assert all(len(row) <= 1 for worker in made for part in worker for row in part)


def test_packed_examples_do_not_see_each_other(small_model: str) -> None:
    draw = np.random.default_rng(0)
    texts = [draw.integers(10, 500, size).tolist() for size in (7, 3, 12, 5)]
    rows = batches.TokenRows(
        pa.table({"input_ids": pa.array(texts, pa.list_(pa.int32())), "labels": pa.array(texts, pa.list_(pa.int32())),
                  "weight": pa.array([1.0] * 4, pa.float32())})
    )  # fmt: skip
    [[[row, *_], *_]] = batches.arrange(rows.lengths, 1, None, 32)
    made = rows.tensors([row], packed=True, pad=0, mask=False)
    model = models.load(small_model).eval()
    with torch.no_grad():
        together = model(input_ids=made["input_ids"], position_ids=made["position_ids"], use_cache=False).logits[0]
        start = 0
        for example in row:
            alone = model(input_ids=torch.tensor([texts[example]]), use_cache=False).logits[0]
            torch.testing.assert_close(together[start : start + len(alone)], alone, atol=1e-4, rtol=1e-4)
            assert made["labels"][0, start] == IGNORE
            start += len(alone)
    assert start == 27


def test_packing_and_passes_change_no_loss(small_model: str, chats: str, tmp_path: Path) -> None:
    reference = sft.run(plain(small_model, chats, steps=4), str(tmp_path / "plain"), Workers())
    for name, changes in {
        "packed": {"packing": True},
        "packed-one": {"packing": True, "micro_batch_examples": 1},
        "passes": {"micro_batch_examples": 2},
        "recomputed": {"activation_checkpointing": True, "micro_batch_examples": 4},
    }.items():
        other = sft.run(plain(small_model, chats, steps=4, **changes), str(tmp_path / name), Workers())
        assert losses(other) == pytest.approx(losses(reference), abs=1e-5)
        assert taken(tmp_path / name) == taken(tmp_path / "plain")


def test_losses_are_those_of_trl_on_the_same_batches(small_model: str, chats: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    told = plain(small_model, chats, steps=5, schedule={"warmup": 0, "shape": "constant"}, weight_decay=0.1)
    ours = sft.run(told, str(tmp_path / "ours"), Workers())

    model, tokenizer = models.load(small_model), models.load_tokenizer(small_model)
    models.as_chat(tokenizer, model)
    encoded = sft.encode(told, tokenizer)
    order = finetune.planned_order(encoded, encoded.mixture(told), told)
    rows = encoded.table.select(["input_ids", "labels"]).take(pa.array(order)).to_pylist()
    theirs = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "theirs"), max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
            shuffle_dataset=False, max_length=128, disable_tqdm=True, train_sampling_strategy="sequential",
        ),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    theirs.train()
    found = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert losses(ours) == pytest.approx(found, abs=1e-5)


def test_the_loss_of_an_input_counts_by_its_weight(small_model: str, chats: str, tmp_path: Path) -> None:
    half = [RowsInput(name="chats", directory=chats, loss_weight=0.5)]
    whole = sft.run(plain(small_model, chats, steps=1), str(tmp_path / "whole"), Workers())
    found = sft.run(plain(small_model, chats, steps=1, inputs=half), str(tmp_path / "half"), Workers())
    for key in ("loss", "gradient_norm"):
        assert found["curve"][0][key] == pytest.approx(whole["curve"][0][key] / 2, rel=1e-4)


def test_a_penalty_adds_its_gradient_once_a_step_and_joins_the_curve(
    small_model: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def pull(parameters: Any) -> torch.Tensor:
        calls.append(len(parameters))
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad += 100 * parameter.detach()
        return torch.stack([50 * (parameter.detach() ** 2).sum() for parameter in parameters.values()]).sum()

    monkeypatch.setattr(sft.Trainer, "penalties", {"pull": pull})
    result = sft.run(plain(small_model, chats, steps=3, micro_batch_examples=2), str(tmp_path / "run"), Workers())
    model = models.load(small_model)
    size = sum(float((parameter.detach() ** 2).sum()) for parameter in model.parameters())
    assert len(calls) == 3
    assert result["curve"][0]["pull"] == pytest.approx(50 * size, rel=1e-4)
    assert result["curve"][0]["gradient_norm"] == pytest.approx(100 * size**0.5, rel=0.05)
    assert result["curve"][2]["pull"] < result["curve"][0]["pull"]


# early stopping


def test_training_stops_when_held_out_examples_get_worse_and_the_best_weights_are_exported(
    small_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(3)
    rows = conversations(30)
    for row in rows:  # nothing can be learned from one reply for another
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": "".join(draw.choice(list("甲乙丙丁abcd"), 24))}]
    chats = write_rows(tmp_path / "chats" / "f0", "self_instruct", rows, tables.CONVERSATIONS)
    told = plain(
        small_model, chats, steps=40, held_out=0.3, evaluate_every=2, patience=2, learning_rate=2e-2, checkpoint_every=3,
        schedule={"warmup": 0, "shape": "constant"},
    )  # fmt: skip
    result = sft.run(told, str(tmp_path / "run"), Workers())
    measured = {point["step"]: point["held_out_loss"] for point in result["curve"] if "held_out_loss" in point}
    best = min(measured, key=lambda step: (measured[step], step))
    assert result["stopped_early"]
    assert result["steps"] == best + 4 == max(measured) < 40
    assert result["best"]["step"] == best
    assert list(measured) == list(range(2, result["steps"] + 1, 2))
    kept = {row["id"] for row in rows} - {row["id"] for row in taken(tmp_path / "run")}
    held = {row["id"] for row in rows if holdout.is_held_out([row["id"]], 0, 0.3)[0]}
    assert held <= kept
    assert result["set_aside"] == {"held_out": len(held)}

    model, tokenizer = models.load(str(tmp_path / "run" / "model")).eval(), models.load_tokenizer(small_model)
    models.as_chat(tokenizer, model)
    apart = sft.encode(told, tokenizer).held_out
    assert apart is not None
    total, count = 0.0, 0
    with torch.no_grad():
        for row in apart.to_pylist():
            logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:], dtype=torch.long)
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
            count += int((labels != IGNORE).sum())
    assert total / count == pytest.approx(measured[best], abs=1e-4)

    # Stopped by the user at a step between, it goes on to the same end; and again when killed before the export.
    with pytest.raises(JobCancelled):
        sft.run(told, str(tmp_path / "again"), Workers(report=lambda done, *_: done == best + 1))
    resumed = sft.run(told, str(tmp_path / "again"), Workers())
    assert [point["step"] for point in resumed["curve"]] == [point["step"] for point in result["curve"]]
    assert losses(resumed) == pytest.approx(losses(result), abs=1e-5)
    assert resumed["best"]["step"] == best

    def full_disk(*_: Any) -> None:
        raise OSError("no space left")

    every = told.model_copy(update={"checkpoint_every": 1})
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "export", full_disk)
        with pytest.raises(OSError, match="no space left"):
            sft.run(every, str(tmp_path / "unwritten"), Workers())
    told_steps: list[int] = []
    finished = sft.run(every, str(tmp_path / "unwritten"), Workers(report=lambda done, *_: bool(told_steps.append(done))))
    assert told_steps == [result["steps"]]  # the plan, and no step more
    assert losses(finished) == losses(result)
    assert finished["stopped_early"]


# refusals


def test_what_cannot_be_had_here_is_refused_before_anything_is_loaded(chats: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    told = job(str(tmp_path / "no model there"), chats, chats, lora=LoraSettings(quantize="nf4"))
    with pytest.raises(ValueError, match="nf4 needs a CUDA GPU"):
        sft.run(told, str(tmp_path / "run"), Workers())


def test_sharding_none_insists_on_one_worker(chats: str) -> None:
    with pytest.raises(ValueError, match="insists on one worker"):
        finetune.arguments(job("m", chats, chats, sharding="none"), Workers(0, 2), "/tmp/none")


# formats


def test_alpaca_sharegpt_and_messages_reach_labels_alike(small_model: str, tmp_path: Path) -> None:
    from operators.config import parse
    from operators.stage import StageContext

    rows: dict[str, dict[str, Any]] = {
        "alpaca": {"instruction": "翻译", "input": "copper", "output": "铜。"},
        "sharegpt": {"conversations": [{"from": "human", "value": "翻译\n\ncopper"}, {"from": "gpt", "value": "铜。"}]},
        "messages": {"messages": [{"role": "user", "content": "翻译\n\ncopper"}, {"role": "assistant", "content": "铜。"}]},
    }
    model, tokenizer = models.load(small_model), models.load_tokenizer(small_model)
    models.as_chat(tokenizer, model)
    found = {}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
        directory = str(tmp_path / "runs" / name / "f0")
        stage = parse(ConversationsStage, {"kind": "conversations", "path": f"{name}.jsonl", "format": name}, name)
        stage.run(StageContext(name, "conversations", directory, "f0", {}, {}, 17, base_directory=str(tmp_path)))
        [encoded] = sft.encode(plain(small_model, directory), tokenizer).table.to_pylist()
        assert tokenizer.decode([label for label in encoded["labels"] if label != IGNORE]) == "铜。<|im_end|>"
        found[name] = (encoded["input_ids"], encoded["labels"])
    assert found["alpaca"] == found["sharegpt"] == found["messages"]


def test_rows_that_a_template_refuses_are_set_aside_and_counted(small_model: str, tmp_path: Path) -> None:
    rows = conversations(3)
    rows[1]["messages"] = [{"role": "system", "content": "你好"}, *rows[1]["messages"]]
    directory = write_rows(tmp_path / "chats" / "f0", "self_instruct", rows, tables.CONVERSATIONS)
    model, tokenizer = models.load(small_model), models.load_tokenizer(small_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    models.as_chat(tokenizer, model)
    made = sft.encode(plain(small_model, directory), tokenizer)
    assert made.set_aside == {"refused_by_chat_template": 1}
    assert [part.to_pylist() for part in made.ids] == [["chat-0", "chat-2"]]


# two workers

_LAYOUTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"rank": 8, "dropout": 0.0}, "learning_rate": 1e-2},
    "dora": {"lora": {"rank": 8, "dora": True}, "learning_rate": 1e-2},
}


def _worker(rank: int, port: int, out: str, told: list[tuple[str, dict[str, Any], int | None, int]]) -> None:
    """Do the jobs (name, settings, step to be stopped at, step to be killed at) as one of two workers."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    workers = Workers.here()
    for name, values, stop, kill in told:

        def report(done: int, *_: Any, stop: int | None = stop, kill: int = kill) -> bool:
            if done and done == kill:
                os._exit(9)
            return bool(done) and done == stop

        workers.report = report
        try:
            sft.run(SftJob(**values), f"{out}/{name}", workers)
        except JobCancelled:
            assert stop is not None
    torch.distributed.destroy_process_group()


def two(out: Path, told: list[tuple[str, dict[str, Any], int | None, int]], dies: bool = False) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context: Any = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_worker, args=(rank, port, str(out), told), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    processes[0].join(300)
    if dies:
        assert processes[0].exitcode == 9
        processes[1].kill()  # its partner is gone in the middle of a collective
    processes[1].join(60)
    assert dies or [process.exitcode for process in processes] == [0, 0]


def result_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "result.json").read_text("utf-8")))


def dumped(told: SftJob) -> dict[str, Any]:
    return told.model_dump(mode="json")


@pytest.mark.slow
def test_shards_and_whole_copies_give_one_worker_s_losses_and_go_on_from_each_other_s_checkpoints(
    small_model: str, chats: str, tmp_path: Path
) -> None:
    full = plain(small_model, chats, steps=6)
    lora = plain(small_model, chats, steps=4, **_LAYOUTS["lora"])
    alone = sft.run(full, str(tmp_path / "alone"), Workers())
    one = sft.run(lora, str(tmp_path / "one"), Workers())
    sharded = full.model_copy(update={"sharding": "fsdp2", "packing": True, "micro_batch_examples": 1})
    two(
        tmp_path,
        [
            ("moved", dumped(sharded), 3, 0),
            ("moved", dumped(full), None, 0),
            ("adapter", dumped(lora.model_copy(update={"sharding": "fsdp2"})), None, 0),
        ],
    )
    moved, adapter = result_of(tmp_path / "moved"), result_of(tmp_path / "adapter")
    assert losses(moved) == pytest.approx(losses(alone), abs=1e-4)
    assert losses(adapter) == pytest.approx(losses(one), abs=1e-4)
    assert taken(tmp_path / "moved") == taken(tmp_path / "alone")
    assert not (tmp_path / "moved" / "checkpoints").exists()

    ids = torch.arange(5, 60)[None]
    adapted = PeftModel.from_pretrained(models.load(small_model), str(tmp_path / "adapter" / "adapter")).eval()
    with torch.no_grad():
        for name, reference in (("moved", "alone"), ("adapter", "one")):
            found, expected = (models.load(str(tmp_path / run / "model")).eval()(ids).logits for run in (name, reference))
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(models.load(str(tmp_path / "adapter" / "model")).eval()(ids).logits, adapted(ids).logits)
    assert adapter["trainable_parameters"] == one["trainable_parameters"] < adapter["parameters"] == one["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_workers_that_are_killed_go_on_with_the_same_samples_and_losses(
    small_model: str, chats: str, tmp_path: Path, sharding: str
) -> None:
    told = {
        kind: plain(small_model, chats, steps=8, checkpoint_every=3, held_out=0.2, evaluate_every=2, sharding=sharding, **changes)
        for kind, changes in _LAYOUTS.items()
    }
    two(tmp_path, [(f"whole-{kind}", dumped(settings), None, 0) for kind, settings in told.items()])
    for kind, settings in told.items():
        two(tmp_path, [(f"killed-{kind}", dumped(settings), None, 5)], dies=True)
        found = checkpoint.latest(str(tmp_path / f"killed-{kind}" / "checkpoints"))
        assert found is not None
        assert found[0] == 3
        shutil.copytree(tmp_path / f"killed-{kind}", tmp_path / f"alone-{kind}")
    two(tmp_path, [(f"killed-{kind}", dumped(settings), None, 0) for kind, settings in told.items()])
    for kind, settings in told.items():
        whole, killed = result_of(tmp_path / f"whole-{kind}"), result_of(tmp_path / f"killed-{kind}")
        assert losses(killed) == losses(whole)
        assert killed["best"] == whole["best"]
        assert taken(tmp_path / f"killed-{kind}") == taken(tmp_path / f"whole-{kind}")
        alone = sft.run(settings, str(tmp_path / f"alone-{kind}"), Workers())  # one worker takes up what two began
        assert losses(alone) == pytest.approx(losses(whole), abs=1e-4)


def test_a_model_that_was_not_cut_is_told_from_one_that_was() -> None:
    from train import sharding

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="holds 144 of 144 parameters, not a share of 1/2: nothing was sharded"):
        sharding.verify(model, whole, 2)
