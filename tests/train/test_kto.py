"""Alignment from marked replies: the numbers of TRL, however the batch is cut, and honest accounts of what is not usable."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import KTOConfig, KTOTrainer

from operators import tables
from tests.train.conftest import preferences, write_rows
from tests.train.test_dpo import PARITY, closing_model  # noqa: F401  a fixture
from train import finetune, kto, models, samples
from train.parallel import Workers
from train.settings import RowsInput
from train.settings_finetune import KtoJob, LoraSettings

SCHEMA = tables.CONVERSATIONS.append(pa.field("label", pa.bool_()))


def marked_replies(count: int = 60) -> list[dict[str, Any]]:
    """Conversations, two in three marked good, half of them Chinese."""
    rows = []
    for number, pair in enumerate(preferences(count)):
        good = number % 3 != 0
        rows.append(
            {
                "id": f"reply-{number}", "messages": pair["prompt"] + pair["chosen" if good else "rejected"],
                "lang": pair["lang"], "tools": None, "provenance": None, "label": good,
            }
        )  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("run") / "replies" / "f0", "conversations", marked_replies(), SCHEMA)


def job(model: str, replies: str, **changes: Any) -> KtoJob:
    values = {key: value for key, value in PARITY.items() if key != "held_out"} | {
        "model": model, "inputs": [RowsInput(name="replies", directory=replies)], "max_length": 128, "steps": 3,
    }  # fmt: skip
    return KtoJob(**{**values, **changes})


def of_trl(settings: KtoJob, directory: Path, **told: Any) -> list[dict[str, Any]]:
    """The log of TRL's own trainer on the same replies in the same order."""
    tokenizer = models.load_tokenizer(settings.model)
    examples = kto.encode(settings, tokenizer)
    rows = [marked_replies()[row] for row in finetune.planned_order(examples, examples.mixture(settings), settings)]
    data = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:], "label": r["label"]} for r in rows]
    running = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32),
        args=KTOConfig(
            output_dir=str(directory), max_steps=settings.steps, per_device_train_batch_size=8,
            learning_rate=settings.learning_rate, lr_scheduler_type="constant", max_grad_norm=1.0, max_length=128,
            train_sampling_strategy="sequential", logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
            bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=settings.seed, **told,
        ),
        train_dataset=Dataset.from_list(data), processing_class=tokenizer,
    )  # fmt: skip
    running.train()
    return [entry for entry in running.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"undesirable_weight": 1.5}, {"undesirable_weight": 1.5}),
        pytest.param({"loss": "apo_zero_unpaired"}, {"loss_type": "apo_zero_unpaired"}, marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_trl_run_as_it_is(
    closing_model: str,  # noqa: F811
    replies: str,
    tmp_path: Path,
    ours: dict[str, Any],
    theirs: dict[str, Any],
) -> None:
    settings = job(closing_model, replies, **ours)
    result, log = kto.run(settings, str(tmp_path / "ours"), Workers()), of_trl(settings, tmp_path / "theirs", **theirs)
    for name, key in (("loss", "loss"), ("chosen_reward", "rewards/chosen"), ("rejected_reward", "rewards/rejected")):
        assert [point[name] for point in result["curve"]] == pytest.approx([entry[key] for entry in log], abs=1e-5, rel=1e-5), name
    assert [point["divergence"] for point in result["curve"]] == pytest.approx([entry["kl"] for entry in log], abs=1e-4)


def test_a_batch_that_is_cut_has_the_loss_of_the_whole(small_model: str, replies: str, tmp_path: Path) -> None:
    curves = []
    for name, changes in (("whole", {}), ("cut", {"micro_batch_examples": 2})):
        result = kto.run(job(small_model, replies, learning_rate=3e-4, **changes), str(tmp_path / name), Workers())
        curves.append([[point["loss"], point["divergence"]] for point in result["curve"]])
    assert curves[0][0] == pytest.approx([0.5, 0.0], abs=1e-5)
    assert curves[0][-1][1] > 0
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-4)


def test_adapters_learn_from_marks_and_more_epochs_than_one(small_model: str, replies: str, tmp_path: Path) -> None:
    settings = job(small_model, replies, lora=LoraSettings(rank=8), learning_rate=5e-3, steps=12)
    result = kto.run(settings, str(tmp_path / "run"), Workers())
    assert result["epochs"] > 1
    assert result["curve"][-1]["margin"] > 0.1
    assert math.isfinite(result["curve"][-1]["divergence"])
    assert (tmp_path / "run" / "adapter").is_dir()


def test_each_reply_is_compared_with_the_one_before_it_in_its_batch(small_model: str, replies: str) -> None:
    settings = job(small_model, replies)
    tokenizer, model = models.load_tokenizer(small_model), models.load(small_model)
    models.as_chat(tokenizer, model)
    examples = kto.encode(settings, tokenizer)
    order = finetune.planned_order(examples, examples.mixture(settings), settings)
    laid = kto.in_order(settings, examples, order).table.to_pylist()
    known = examples.table.to_pylist()
    for position, row in enumerate(laid):
        assert row["chosen_ids"] == known[order[position]]["completion_ids"]
        last = position - 1 if position % 8 else position + 7
        assert row["rejected_ids"] == known[order[last]]["completion_ids"]


def test_rows_that_cannot_be_used_are_counted_and_inputs_without_labels_refused(
    small_model: str, chats: str, tmp_path: Path
) -> None:
    rows = marked_replies(8)
    rows[0]["label"] = None
    rows[1]["messages"] = rows[1]["messages"][:1]
    rows[2]["messages"][0]["content"] = "很长 " * 500
    rows[3]["tools"] = '[{"type": "function", "function": {"name": "weather"}}]'
    directory = write_rows(tmp_path / "replies" / "f0", "conversations", rows, SCHEMA)
    tokenizer, model = models.load_tokenizer(small_model), models.load(small_model)
    models.as_chat(tokenizer, model)
    examples = kto.encode(job(small_model, directory), tokenizer)
    assert examples.set_aside == {"no_label": 1, "no_reply_at_the_end": 1, "prompt_too_long": 1}
    assert examples.ids[0].to_pylist() == [f"reply-{number}" for number in range(3, 8)]
    first = examples.table.to_pylist()[0]
    assert '"name": "weather"' in tokenizer.decode(first["prompt_ids"])
    assert tokenizer.decode(first["completion_ids"]).endswith("<|im_end|>")
    with pytest.raises(ValueError, match=r"input 'replies' has no labels .* `format: kto`"):
        kto.encode(job(small_model, chats), tokenizer)


def worker_of_two(rank: int, port: int, told: KtoJob, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    workers = Workers.here()
    kto.run(told, directory, workers)
    workers.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_workers_take_the_steps_of_one(small_model: str, replies: str, tmp_path: Path, sharding: str) -> None:
    told = job(small_model, replies, micro_batch_examples=2, sharding=sharding)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = torch.multiprocessing.spawn(worker_of_two, (port, told, str(tmp_path / "two")), nprocs=2, join=False)
    one = kto.run(told.model_copy(update={"sharding": "ddp"}), str(tmp_path / "one"), Workers())
    while not together.join(timeout=300):
        pass
    two = samples.read_result(str(tmp_path / "two"))
    assert two is not None
    for name in ("loss", "divergence"):  # rewards in the curve are TRL's means of the means of passes
        expected = [point[name] for point in one["curve"]]
        assert [point[name] for point in two["curve"]] == pytest.approx(expected, abs=1e-4), name
