"""Reinforcement by verifiable rewards: draws that depend on position alone, steps of TRL, resume, and a model that learns."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from operators import shards, tables
from operators.config import parse
from operators.quality.model_scorer import Scoring
from operators.stage import StageContext
from operators.synthesis.reward import ConversationScorer
from pipelines.stages.preferences import PreferencesStage
from pipelines.stages.reinforcement import GrpoStage, RewardModelStage
from tests.train.conftest import write_rows
from tests.train.test_pretrain import taken
from train import checkpoint, finetune, grpo, jobs, models, samples, sampling
from train.errors import JobCancelled
from train.parallel import Workers
from train.settings import RowsInput
from train.settings_alignment import GrpoJob
from train.settings_finetune import LoraSettings


def questions(count: int) -> list[dict[str, Any]]:
    """Sums of one digit, in English and Chinese, with their answers."""
    rows = []
    for number in range(count):
        zh = number % 2
        ask = f"{number % 5}加{number % 3}等于几？" if zh else f"What is {number % 5} + {number % 3}?"
        reply = f"答案：{number % 5 + number % 3}" if zh else f"Answer: {number % 5 + number % 3}"
        messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
        rows.append({"id": f"sum-{number}", "messages": messages, "lang": "zh" if zh else "en", "tools": None, "provenance": None})
    return rows


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = questions(24)
    rows.append({**rows[0], "id": "asked", "messages": rows[0]["messages"][:1]})
    rows.append({**rows[0], "id": "long", "messages": [{"role": "user", "content": "long " * 200}, rows[0]["messages"][1]]})
    rows.append({**rows[0], "id": "empty", "messages": rows[0]["messages"][1:]})
    return write_rows(tmp_path_factory.mktemp("run") / "sums" / "f0", "conversations", rows, tables.CONVERSATIONS)


REWARDS: dict[str, Any] = {
    "digit": {"check": "pattern", "pattern": r"\d", "whole": False},
    "right": {"check": "exact", "weight": 0.5},
    "short": {"check": "length", "most": 4, "slack": 20, "weight": 0.5},
}


def job(model: str, directory: str, **changes: Any) -> GrpoJob:
    values = {
        "model": model, "inputs": [RowsInput(name="sums", directory=directory)], "steps": 4, "learning_rate": 1e-3,
        "batch_examples": 4, "samples": 4, "max_new_tokens": 8, "max_length": 128, "checkpoint_every": 2, "rewards": REWARDS,
    }  # fmt: skip
    return GrpoJob(**{**values, **changes})


def replies(directory: Path) -> list[dict[str, Any]]:
    return taken(directory)


@pytest.fixture(scope="module")
def trained(small_model: str, sums: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run") / "better" / "f0"
    torch.set_num_threads(1)
    return directory, grpo.run(job(small_model, sums), str(directory), Workers())


def test_every_reply_is_a_row_with_its_rewards(trained: tuple[Path, dict[str, Any]]) -> None:
    directory, result = trained
    rows = replies(directory)
    assert result["completions"] == len(rows) == 4 * 4 * 4
    assert result["tokens"] == sum(row["tokens"] for row in rows)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    for start in range(0, len(rows), 4):
        group = rows[start : start + 4]
        assert len({(row["step"], row["position"], row["id"], row["row"]) for row in group}) == 1
        assert [row["sample"] for row in group] == [0, 1, 2, 3]
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-4)
    for row in rows:
        weighted = sum(value * (1.0 if name == "digit" else 0.5) for name, value in row["rewards"].items() if value is not None)
        assert row["reward"] == pytest.approx(weighted, abs=1e-6)
        assert row["rewards"]["digit"] == float(any(char.isdigit() for char in row["reply"]))
        assert (row["rewards"]["right"] is None) == (row["id"] == "asked")
    assert len({row["reply"] for row in rows}) > 16
    assert result["set_aside"] == {"no_prompt": 1, "prompt_too_long": 1}
    ledger = shards.committed_units(str(directory))[0]["ledger"]
    assert ledger["created"] == ledger["kept"] == len(rows)
    assert not (directory / "rounds").exists()
    point = result["curve"][0]
    assert {"loss", "reward", "reward_digit", "reward_right_deviation", "zero_variance", "kl", "reply_tokens"} <= point.keys()
    assert point["kl"] == pytest.approx(0, abs=1e-6)
    assert point["reward"] == pytest.approx(np.mean([row["reward"] for row in rows[:16]]), abs=1e-5)


def test_draws_are_those_of_the_distribution_and_hang_on_nothing_else() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    count = 20_000
    keys = torch.from_numpy(sampling.keys(3, np.arange(count), np.zeros(count, np.int64)))
    scores = probabilities.log().repeat(count, 1)
    prompts: Any = torch.zeros(count, 5, dtype=torch.long)
    noise = sampling.GumbelNoise(keys, 5)
    drawn = noise(prompts, scores.clone()).argmax(dim=1)  # type: ignore[arg-type]
    found = torch.bincount(drawn, minlength=4) / count
    torch.testing.assert_close(found, probabilities, atol=0.015, rtol=0)
    some = torch.tensor([7, 4_000, 19_999])
    again = sampling.GumbelNoise(keys[some], 2)(prompts[some, :2], scores[some].clone()).argmax(dim=1)  # type: ignore[arg-type]
    assert again.tolist() == drawn[some].tolist()
    later: Any = torch.zeros(count, 6, dtype=torch.long)
    other = noise(later, scores.clone()).argmax(dim=1)  # type: ignore[arg-type]
    assert float((other == drawn).float().mean()) == pytest.approx(float((probabilities**2).sum()), abs=0.02)


def test_a_run_that_was_stopped_goes_on_with_the_same_replies(
    trained: tuple[Path, dict[str, Any]], small_model: str, sums: str, tmp_path: Path
) -> None:
    directory, result = trained
    calls = 0

    def report(done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
        nonlocal calls
        calls += 1
        return done == 3

    with pytest.raises(JobCancelled):
        grpo.run(job(small_model, sums), str(tmp_path / "run"), Workers(report=report))
    again = grpo.run(job(small_model, sums), str(tmp_path / "run"), Workers())
    for point, expected in zip(again["curve"], result["curve"], strict=True):
        assert {name: (value, expected[name]) for name, value in point.items() if value != expected[name]} == {}
    assert replies(tmp_path / "run") == replies(directory)
    first, second = (models.load(str(path / "model")).state_dict() for path in (directory, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def killed_at_step_three(settings: GrpoJob, directory: str) -> None:
    def report(done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
        if done == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    torch.set_num_threads(1)
    grpo.run(settings, directory, Workers(report=report))


@pytest.mark.slow
def test_a_run_that_was_killed_draws_the_same_replies_from_its_checkpoint_on(
    trained: tuple[Path, dict[str, Any]], small_model: str, sums: str, tmp_path: Path
) -> None:
    directory, result = trained
    settings = job(small_model, sums)
    process = torch.multiprocessing.get_context("spawn").Process(
        target=killed_at_step_three, args=(settings, str(tmp_path / "run"))
    )
    process.start()
    process.join(timeout=600)
    assert process.exitcode == -signal.SIGKILL
    left = checkpoint.latest(str(tmp_path / "run" / "checkpoints"))
    assert left is not None and left[0] == 2, "the third step's round is on file, its weights are not"
    again = grpo.run(settings, str(tmp_path / "run"), Workers())
    for point, expected in zip(again["curve"], result["curve"], strict=True):
        assert {name: (value, expected[name]) for name, value in point.items() if value != expected[name]} == {}
    assert replies(tmp_path / "run") == replies(directory)


def test_the_first_loss_and_gradient_are_those_of_the_formula(small_model: str, sums: str, tmp_path: Path) -> None:
    """DAPO's and RLOO's loss by plain transformers over the replies on file."""
    for algorithm in ("grpo", "rloo"):
        settings = job(small_model, sums, algorithm=algorithm, steps=1, beta=0.0, clip=1e9, micro_batch_examples=8)
        directory = tmp_path / algorithm
        result = grpo.run(settings, str(directory), Workers())
        model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
        tokenizer = models.load_tokenizer(small_model)
        models.as_chat(tokenizer, model)
        examples = grpo.encode(settings, tokenizer)
        order = finetune.planned_order(examples, examples.mixture(settings), settings)
        rows = replies(directory)
        rewards = np.array([row["reward"] for row in rows]).reshape(4, 4)
        if algorithm == "grpo":
            advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
        else:
            advantages = rewards - (rewards.sum(1, keepdims=True) - rewards) / 3
        assert [row["advantage"] for row in rows] == pytest.approx(advantages.ravel().tolist(), abs=1e-4)
        totals = []
        ended = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
        for number, row in enumerate(rows):
            prompt = examples.table.column("prompt_ids")[int(order[number // 4])].as_py()
            reply = redrawn(model, settings, prompt, row, ended)
            assert len(reply) == row["tokens"]
            logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            said = logits[torch.arange(len(reply)), torch.tensor(reply)].sum()
            totals.append(-said * float(advantages.ravel()[number]))
        tokens = sum(row["tokens"] for row in rows)
        loss: Any = sum(totals) / (tokens if algorithm == "grpo" else len(rows))  # its gradient is that of the loss on policy
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
        assert result["curve"][0]["gradient_norm"] == pytest.approx(norm, rel=2e-3), algorithm


def redrawn(model: Any, settings: GrpoJob, prompt: list[int], row: dict[str, Any], ends: set[int]) -> list[int]:
    """The reply on file drawn once more, by itself and without a cache."""
    key = torch.from_numpy(sampling.keys(settings.seed, np.array([row["position"]]), np.array([row["sample"]])))
    noise = sampling.GumbelNoise(key, len(prompt))
    reply: list[int] = []
    while len(reply) < settings.max_new_tokens and not (reply and reply[-1] in ends):
        so_far: Any = torch.tensor([prompt + reply])
        with torch.no_grad():
            reply.append(int(noise(so_far, model(so_far).logits[:, -1]).argmax()))
    return reply


class InThisProcess:
    """The training group of a run, without a group."""

    def run(self, job: dict[str, Any], progress: Any, cancelled: Any) -> dict[str, Any]:
        settings, function = jobs.load(job["kind"])
        return function(parse(settings, job["config"], job["kind"]), job["directory"], Workers())


def stage_run(stage: Any, name: str, root: Path, inputs: dict[str, str]) -> str:
    directory = str(root / name / "f0")
    services = {"train": lambda: InThisProcess()}
    stage.validate_deep()
    assert set(stage.input_names()) == set(inputs)
    stage.run(StageContext(name, stage.kind, directory, "f0", {}, inputs, 0, services=services, cache_directory=str(root)))
    return directory


def test_a_reward_model_that_a_stage_made_judges_in_other_stages(small_model: str, sums: str, pairs: str, tmp_path: Path) -> None:
    pairs, sums = (str(shutil.copytree(path, tmp_path / name / "f0")) for path, name in ((pairs, "pairs"), (sums, "sums")))
    common = {"steps": 2, "learning_rate": 1e-3, "model": small_model}
    judging = RewardModelStage.model_validate({**common, "kind": "reward", "input": "pairs"})
    judge = stage_run(judging, "judge", tmp_path, {"pairs": pairs})
    given = {
        **common, "kind": "grpo", "input": {"sums": 1.0}, "rewards": {"better": {"check": "reward_model", "model": "@judge"}},
        "iterations": 2, "lora": {"rank": 4}, "loss": "grpo", "batch_examples": 4, "samples": 4, "max_new_tokens": 8,
        "checkpoint_every": 1,
    }  # fmt: skip
    learning = GrpoStage.model_validate(given)
    directory = Path(stage_run(learning, "better", tmp_path, {"sums": sums, "judge": judge}))
    manifest = shards.load_manifest(str(directory))
    rows = replies(directory)
    assert len(rows) == 16  # two steps on one round
    assert manifest.stats["tokens"] == 2 * sum(row["tokens"] for row in rows)
    assert set(manifest.files) == {"model", "tokenizer", "adapter"}
    asked = {row["id"]: row["messages"][0]["content"] for row in questions(24)}
    asked["asked"] = asked["sum-0"]
    # A `preferences` stage that names the same stage asks the model in this way.
    asking = PreferencesStage.model_validate(
        {"kind": "preferences", "input": "sums", "scorer": "reward", "reward": {"model": "@judge"}, "generator": {"model": "@chat"}}
    )
    assert "judge" in asking.input_names()
    found = asking.reward_settings(StageContext("p", "preferences", str(tmp_path), "f0", {}, {"judge": judge}, 0))
    assert found is not None
    scoring = Scoring(found.model, "r", found.label, found.activation, found.max_tokens, found.batch_tokens, found.device, None)
    conversations: Any = [(("user", asked[row["id"]]), ("assistant", row["reply"])) for row in rows]
    scores = ConversationScorer(scoring, found.form).score(conversations)
    assert [row["rewards"]["better"] for row in rows] == pytest.approx([float(reply.text) for reply in scores], abs=2e-4)


def test_what_cannot_be_done_here_is_refused_before_anything_is_loaded(sums: str, tmp_path: Path) -> None:
    for changes, said in (
        ({"vllm": {}}, "vllm needs CUDA"),
        ({"loss": "bnpo", "micro_batch_examples": 4}, "the batch must not be cut"),
        ({"batch_examples": 3, "vllm": None}, "does not divide among 2 workers"),
    ):
        world = 2 if "batch_examples" in changes else 1
        with pytest.raises(ValueError, match=said):
            grpo._check(job("/no/model", sums, **changes), Workers(world=world))


CASES: dict[str, dict[str, Any]] = {
    "full": {"micro_batch_examples": 4},
    "rloo": {"algorithm": "rloo", "iterations": 2},
    "lora": {"lora": LoraSettings(rank=4), "loss": "dr_grpo"},
    "sharded": {"sharding": "fsdp2"},
    "sharded lora": {"sharding": "fsdp2", "lora": LoraSettings(rank=4)},
}


def settings_of(case: str, model: str, directory: str) -> GrpoJob:
    return job(model, directory, learning_rate=1e-4, **CASES[case])


def worker_of_two(rank: int, port: int, model: str, prompts: str, directory: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    workers = Workers.here()
    for case in cases:
        grpo.run(settings_of(case, model, prompts), f"{directory}/{case}", workers)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_draw_the_replies_and_take_the_steps_of_one(small_model: str, sums: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker_of_two, (port, small_model, sums, str(tmp_path / "two"), list(CASES)), nprocs=2)
    for case in CASES:
        one = grpo.run(settings_of(case, small_model, sums), str(tmp_path / "one" / case), Workers())
        two = samples.read_result(str(tmp_path / "two" / case))
        assert two is not None
        assert [row["reply"] for row in replies(tmp_path / "two" / case)] == [
            row["reply"] for row in replies(tmp_path / "one" / case)
        ]
        for name in ("loss", "reward", "kl", "gradient_norm"):
            # Rewards stand where replies were drawn: in the first step of each round.
            expected = [point[name] for point in one["curve"] if name in point]
            assert len(expected) == (2 if case == "rloo" and name in ("reward", "kl") else 4), (case, name)
            found = [point[name] for point in two["curve"] if name in point]
            assert found == pytest.approx(expected, abs=1e-4, rel=1e-3), (case, name)
        first, second = (models.load(str(tmp_path / number / case / "model")).state_dict() for number in ("one", "two"))
        for key, tensor in first.items():
            torch.testing.assert_close(second[key], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_model_learns_to_answer_with_a_digit(small_model: str, sums: str, tmp_path: Path, algorithm: str) -> None:
    rewards = {"digit": {"check": "pattern", "pattern": r"\s*\d\s*"}, "partly": REWARDS["digit"], "ended": {"check": "finished"}}
    settings = job(
        small_model, sums, algorithm=algorithm, steps=80, samples=8, batch_examples=4, learning_rate=2e-3, beta=0.0,
        max_new_tokens=6, rewards=rewards, checkpoint_every=50,
    )  # fmt: skip
    result = grpo.run(settings, str(tmp_path / "run"), Workers())
    rewards_found = result["rewards"]
    assert rewards_found["reward"]["last"] > rewards_found["reward"]["first"] + 0.75, rewards_found
    assert rewards_found["partly"]["first"] < 0.3 and rewards_found["partly"]["last"] > 0.5, rewards_found
