"""The warm group of training workers, and the recipe stages that give it jobs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from operators import shards
from operators.stage import Cancelled, StageContext
from pipelines.stages.alignment import DpoStage
from pipelines.stages.evaluation import EvaluateStage
from pipelines.stages.training import PretrainStage, SftStage
from tests.train.conftest import SHAPE
from train.errors import JobCancelled, TrainingError
from train.session import TrainGroup


@pytest.fixture(scope="module")
def group(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainGroup]:
    group = TrainGroup(2, storage_path=str(tmp_path_factory.mktemp("ray-train")))
    group.start()
    yield group
    group.stop()


def context(run: Path, stage: Any, name: str, inputs: dict[str, str], group: TrainGroup) -> StageContext:
    return StageContext(
        stage=name, kind=stage.kind, directory=str(run / name / "f0"), fingerprint="f0",
        config=stage.model_dump(mode="json"), inputs=inputs, seed=0, services={"train": lambda: group},
    )  # fmt: skip


def linked(run: Path, **stages: str) -> dict[str, str]:
    """Finished stages under one run directory, as a real run has them."""
    found = {}
    for name, directory in stages.items():
        place = run / name / "f0"
        place.parent.mkdir(parents=True)
        place.symlink_to(directory)
        found[name] = str(place)
    return found


def test_all_training_stages_of_a_recipe_run_in_one_group_and_two_workers_agree_with_one(
    group: TrainGroup, tmp_path: Path, packed: str, chats: str, general: str, pairs: str, corpus: str, small_model: str
) -> None:
    run = tmp_path / "runs" / "tiny"
    inputs = linked(run, tokens=packed, chats=chats, general=general, pairs=pairs, clean=corpus)
    manifest = json.loads(Path(packed, "manifest.json").read_text())
    steps: list[tuple[int, int, str]] = []

    def do(name: str, stage: Any) -> dict[str, Any]:
        there = context(run, stage, name, {wanted: inputs[wanted] for wanted in stage.input_names()}, group)
        there.progress = lambda done, total, note: steps.append((done, total, note))
        stage.run(there)
        inputs[name] = there.directory
        return shards.load_manifest(there.directory).__dict__

    base = do("base", PretrainStage(input="tokens", model=SHAPE, steps=20, learning_rate=5e-3, checkpoint_every=10))
    alone = json.loads(Path(small_model).parent.joinpath("result.json").read_text())
    losses = [[point["loss"] for point in curve] for curve in (base["stats"]["curve"], alone["curve"])]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert base["ledger"].created == base["ledger"].kept == 160
    assert {"model", "tokenizer"} <= set(base["files"])
    assert steps[-1][:2] == (20, 20)

    tuning = {"steps": 20, "lora": {"rank": 8}, "max_length": 128}
    chat = do("chat", SftStage(model="base", input={"chats": 0.75, "general": 0.25}, learning_rate=1e-2, **tuning))
    assert chat["stats"]["mixture"]["general"]["samples"] == pytest.approx(40, abs=1)
    falling = [point["loss"] for point in chat["stats"]["curve"]]
    assert sum(falling[-4:]) < 0.97 * sum(falling[:4])
    aligned = do("aligned", DpoStage(model="chat", input="pairs", learning_rate=5e-3, **tuning))
    assert aligned["stats"]["curve"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert aligned["stats"]["curve"][-1]["loss"] < 0.65

    manifest["config"] = {"holdout": 0.1}
    (run / "packed" / "f0").mkdir(parents=True)
    (run / "packed" / "f0" / "manifest.json").write_text(json.dumps(manifest))
    inputs["packed"] = str(run / "packed" / "f0")
    prompts = [{"text": "什么会发光？", "lang": "zh"}, {"text": "What glows?", "lang": "en"}]
    scores = do(
        "scores",
        EvaluateStage(
            models=["base", "chat", "aligned"], input="clean", packed="packed", pairs="pairs", reference="chat",
            prompts=prompts, max_new_tokens=8,
        ),
    )  # fmt: skip
    assert {(row["model"], row["lang"]) for row in scores["stats"]["perplexity"]} >= {("base", "zh"), ("aligned", "en")}
    assert scores["stats"]["preference_accuracy_vs_reference"]["aligned"] > 0.5
    assert [set(row["replies"]) for row in scores["stats"]["samples"]] == [{"base", "chat", "aligned"}] * 2
    rows = sum(pq.read_metadata(Path(inputs["scores"], part["name"])).num_rows for part in scores["parts"])
    assert rows == scores["ledger"].kept > 0


def test_an_error_in_a_job_reaches_its_stage_and_leaves_the_group_alive(group: TrainGroup, tmp_path: Path, packed: str) -> None:
    config = {"inputs": [{"name": "tokens", "directory": packed}], "model": SHAPE, "steps": 2}
    with pytest.raises(TrainingError, match="no model at /nowhere: the directory does not exist"):
        group.run({"kind": "pretrain", "config": {**config, "model": "/nowhere"}, "directory": str(tmp_path / "a")})
    with pytest.raises(TrainingError, match="pretrain: unknown key 'step'; did you mean 'steps'"):
        group.run({"kind": "pretrain", "config": {**config, "step": 1}, "directory": str(tmp_path / "b")})
    result = group.run({"kind": "pretrain", "config": config, "directory": str(tmp_path / "c")})
    assert result["steps"] == 2


def test_a_stopped_job_ends_with_a_checkpoint_and_goes_on_when_asked_again(group: TrainGroup, tmp_path: Path, packed: str) -> None:
    stage = PretrainStage(input="tokens", model=SHAPE, steps=2000, learning_rate=1e-3)
    there = context(tmp_path / "runs" / "r", stage, "base", {"tokens": packed}, group)
    there.progress = lambda done, total, note: there.cancelled.set() if done >= 2 else None
    with pytest.raises(Cancelled, match=r"stage base: stopped after step \d+ of 2000"):
        stage.run(there)
    stopped = max(int(left.name.rsplit("-", 1)[1]) for left in Path(there.directory, "checkpoints").glob("step-*"))
    seen: list[int] = []
    with pytest.raises(JobCancelled):
        group.run(
            {"kind": "pretrain", "directory": there.directory, "config": {
                **stage.model_dump(mode="json", include={"steps", "learning_rate"}), "model": SHAPE,
                "inputs": [{"name": "tokens", "directory": packed}],
            }},
            lambda done, total, note, metrics: seen.append(done),
            lambda: bool(seen),
        )  # fmt: skip
    assert seen[0] > stopped


def train_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended while we looked
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_job_goes_on_from_its_checkpoint(
    group: TrainGroup, tmp_path: Path, packed: str
) -> None:
    config = {
        "inputs": [{"name": "tokens", "directory": packed}], "model": SHAPE, "steps": 60, "learning_rate": 5e-3,
        "checkpoint_every": 5, "parallel": {"sharding": "fsdp2"},
    }  # fmt: skip
    killed = threading.Event()

    def kill(done: int, total: int, note: str, metrics: dict[str, Any]) -> None:
        if done >= 12 and not killed.is_set():
            killed.set()
            os.kill(train_workers()[0].pid, signal.SIGKILL)

    result = group.run({"kind": "pretrain", "config": config, "directory": str(tmp_path / "a")}, kill)
    assert killed.is_set()
    plain = {**config, "parallel": {"sharding": "ddp"}}
    reference = group.run({"kind": "pretrain", "config": plain, "directory": str(tmp_path / "b")})
    losses = [[point["loss"] for point in one["curve"]] for one in (result, reference)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
