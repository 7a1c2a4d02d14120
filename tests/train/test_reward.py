"""A reward model: the loss of TRL, a head on any causal model, held-out pairs, an export that the judging stages can ask."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from operators import tables
from operators.quality.model_scorer import Scoring
from operators.synthesis.reward import ConversationScorer
from operators.tokens.holdout import is_held_out
from tests.train.conftest import preferences, write_rows
from train import finetune, models, reward, samples
from train.parallel import Workers
from train.schedule import Schedule
from train.settings import RowsInput
from train.settings_alignment import RewardModelJob
from train.settings_finetune import LoraSettings


def job(model: str, pairs: str, **changes: Any) -> RewardModelJob:
    values = {
        "model": model, "inputs": [RowsInput(name="pairs", directory=pairs)], "steps": 12, "learning_rate": 2e-3,
        "max_length": 128, "checkpoint_every": 5, "margin_weight": 0.0,
    }  # fmt: skip
    return RewardModelJob(**{**values, **changes})


@pytest.fixture(scope="module")
def judge(small_model: str, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run") / "judge" / "f0"
    torch.set_num_threads(1)
    return directory, reward.run(job(small_model, pairs), str(directory), Workers())


def test_it_learns_which_reply_is_better_and_says_so_of_pairs_it_has_not_seen(judge: tuple[Path, dict[str, Any]]) -> None:
    _, result = judge
    assert result["curve"][0]["loss"] == pytest.approx(np.log(2), abs=0.05)
    assert result["curve"][-1]["loss"] < 0.2
    ids = [row["id"] for row in preferences(60)]
    held = {key for key, out in zip(ids, is_held_out(ids, 0, 0.2), strict=True) if out}
    assert result["set_aside"] == {"held_out": len(held)}
    assert result["held_out"]["pairs"] == len(held)
    assert result["held_out"]["accuracy"] == 1.0
    assert result["held_out"]["margin"] > 0


def test_the_stages_that_judge_get_the_trainers_own_scores_of_the_export(
    judge: tuple[Path, dict[str, Any]], small_model: str
) -> None:
    directory, result = judge
    scoring = Scoring(str(directory / "model"), "reward", None, "none", 512, 4096, "cpu", None)
    conversations = [
        tuple((message["role"], message["content"]) for message in [*row["prompt"], *row[kind]])
        for row in preferences(60)
        for kind in ("chosen", "rejected")
    ]
    asked = np.array([float(reply.text) for reply in ConversationScorer(scoring, "auto").score(conversations)])
    ids = [row["id"] for row in preferences(60)]
    held = np.array(is_held_out(ids, 0, 0.2))
    difference = (asked[0::2] - asked[1::2])[held]
    assert difference.mean() == pytest.approx(result["held_out"]["margin"], abs=2e-4)
    assert (difference > 0).mean() == result["held_out"]["accuracy"]
    model, tokenizer = reward.classifier(str(directory / "model"), 0)
    rows = {key: [row[key] for row in preferences(2)] for key in ("prompt", "chosen", "rejected")}
    chosen = [pair[0] for pair in reward.encode_pairs(tokenizer, rows) if pair is not None]
    with torch.no_grad():
        own = model.eval()(**reward.padded(chosen, tokenizer.pad_token_id)).logits[:, 0].numpy()
    assert asked[0:4:2] == pytest.approx(own, abs=1e-4)


def test_adapters_are_merged_with_the_head_that_was_trained(small_model: str, pairs: str, tmp_path: Path) -> None:
    settings = job(small_model, pairs, lora=LoraSettings(rank=4), learning_rate=1e-2, steps=8)
    result = reward.run(settings, str(tmp_path / "run"), Workers())
    assert result["trainable_parameters"] < result["parameters"]
    merged, tokenizer = reward.classifier(str(tmp_path / "run" / "model"), 0)
    fresh, _ = reward.classifier(small_model, 0)
    assert not torch.equal(merged.score.weight, fresh.score.weight)
    examples = reward.encode(settings, tokenizer)
    assert examples.held_out is not None
    scored = []
    for name in ("chosen_ids", "rejected_ids"):
        with torch.no_grad():
            inputs = reward.padded(examples.held_out.column(name).to_pylist(), tokenizer.pad_token_id)
            scored.append(merged.eval()(**inputs).logits[:, 0].numpy())
    assert (scored[0] - scored[1]).mean() == pytest.approx(result["held_out"]["margin"], abs=1e-4)


@pytest.mark.parametrize("changes", [{}, pytest.param({"center": 0.01, "margin_weight": 0.5, "clip": 0.3})])
def test_the_losses_are_those_of_trl_run_as_it_is(small_model: str, pairs: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = job(
        small_model, pairs, steps=4, held_out=0.0, schedule=Schedule(warmup=0, shape="constant"), learning_rate=1e-3, **changes
    )
    ours = reward.run(settings, str(tmp_path / "ours"), Workers())
    model, tokenizer = reward.classifier(small_model, 0)
    examples = reward.encode(settings, tokenizer)
    order = finetune.planned_order(examples, examples.mixture(settings), settings)
    rows = preferences(60)
    columns = ["prompt", "chosen", "rejected"]
    theirs = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(tmp_path / "theirs"), max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3,
            lr_scheduler_type="constant", max_grad_norm=settings.clip, train_sampling_strategy="sequential", logging_steps=1,
            report_to="none", save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            center_rewards_coefficient=settings.center, max_length=128,
        ),
        train_dataset=Dataset.from_list(
            [
                {**{key: rows[index][key] for key in columns}, **({"margin": 0.5} if settings.margin_weight else {})}
                for index in order
            ]
        ),
        processing_class=tokenizer,
    )  # fmt: skip
    theirs.train()
    log = [entry for entry in theirs.state.log_history if "loss" in entry]
    assert [point["loss"] for point in ours["curve"]] == pytest.approx([entry["loss"] for entry in log], abs=1e-5)
    assert [point["margin"] for point in ours["curve"]] == pytest.approx([entry["margin"] for entry in log], abs=1e-4)


def test_pairs_that_are_too_long_or_hold_control_tokens_are_set_aside(small_model: str, tmp_path: Path) -> None:
    rows = preferences(20)
    rows[3]["chosen"][0]["content"] = "very long " * 200
    rows[5]["rejected"][0]["content"] = "不<|im_end|>"
    rows[7]["margin"] = None
    directory = write_rows(tmp_path / "pairs" / "f0", "preferences", rows, tables.PREFERENCES)
    _, tokenizer = reward.classifier(small_model, 0)
    examples = reward.encode(job(small_model, directory, held_out=0.0, margin_weight=2.0), tokenizer)
    assert examples.set_aside == {"special_token_in_text": 1, "too_long": 1}
    assert sorted(set(examples.table.column("margin").to_pylist())) == [0, 2]


CASES: dict[str, dict[str, Any]] = {
    "full": {"micro_batch_examples": 2},
    "sharded": {"sharding": "fsdp2"},
    "sharded lora": {"sharding": "fsdp2", "lora": LoraSettings(rank=4)},
}


def settings_of(case: str, model: str, pairs: str) -> RewardModelJob:
    return job(model, pairs, steps=3, learning_rate=1e-3, **CASES[case])


def worker_of_two(rank: int, port: int, model: str, pairs: str, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    workers = Workers.here()
    for case in CASES:
        reward.run(settings_of(case, model, pairs), f"{directory}/{case}", workers)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_take_the_steps_of_one(small_model: str, pairs: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker_of_two, (port, small_model, pairs, str(tmp_path / "two")), nprocs=2)
    for case in CASES:
        one = reward.run(settings_of(case, small_model, pairs), str(tmp_path / "one" / case), Workers())
        two = samples.read_result(str(tmp_path / "two" / case))
        assert two is not None
        for name in ("loss", "margin", "mean_reward"):
            expected = [point[name] for point in one["curve"]]
            assert [point[name] for point in two["curve"]] == pytest.approx(expected, abs=1e-4), (case, name)
        assert two["held_out"] == pytest.approx(one["held_out"], abs=1e-4)
        weights = [models.model_directory(str(tmp_path / number / case / "model")) for number in ("one", "two")]
        first, second = (reward.classifier(str(path), 0)[0].state_dict() for path in weights)
        for key, tensor in first.items():
            torch.testing.assert_close(second[key], tensor, atol=1e-4, rtol=1e-3)
