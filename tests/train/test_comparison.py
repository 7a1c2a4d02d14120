"""Before and after: every fine-tune scores held-out rows first and last, and says what was gained and lost."""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from operators import shards, tables
from operators.config import SettingsError, parse
from operators.stage import Cancelled, StageContext
from operators.tokens import holdout
from pipelines.stages import sets
from pipelines.stages.alignment import DpoStage, KtoStage
from pipelines.stages.promotion import PromoteStage
from pipelines.stages.training import PretrainStage, SftStage, TrainingStage
from tests.train.conftest import conversations, documents, preferences, write_rows
from train import dpo, evaluation_sets, jobs, models
from train.parallel import Workers
from train.scoring import Row, log_probabilities

CONTEXT = 64  # of the small model
DOCUMENTS = pa.schema([*tables.DOCUMENTS, pa.field("lang", pa.string())])


class Group:
    """Training workers that are this process."""

    def __init__(self, stop: int | None = None) -> None:
        self.notes: list[str] = []
        self.stop = stop
        self.job: dict[str, Any] = {}

    def run(self, job: dict[str, Any], *_: Any) -> dict[str, Any]:
        model, function = jobs.load(job["kind"])
        self.job = job

        def report(done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
            self.notes.append(note)
            return note == "steps" and done == self.stop

        return dict(function(parse(model, job["config"], job["kind"]), job["directory"], Workers(report=report)))


class World:
    """A run's directory with stages that are done."""

    def __init__(self, root: Path, model: str) -> None:
        self.root, self.model = root, model
        self.inputs: dict[str, str] = {}
        self.lines: list[str] = []

    def rows(self, name: str, rows: list[dict[str, Any]], schema: pa.Schema, kind: str = "conversations") -> None:
        self.inputs[name] = write_rows(self.root / name / "f0", kind, rows, schema)

    def train(self, name: str, stage: TrainingStage, group: Group | None = None, **changes: Any) -> dict[str, Any]:
        group = group or Group()
        directory = str(self.root / name / "f0")
        inputs = {wanted: self.inputs[wanted] for wanted in stage.input_names()}
        context = StageContext(
            name, stage.kind, directory, "f0", stage.model_dump(mode="json"), inputs, 3,
            cache_directory=str(self.root / ".cache"), services={"train": lambda: group}, log=self.lines.append, **changes,
        )  # fmt: skip
        stage.run(context)
        self.inputs[name] = directory
        return shards.load_manifest(directory).stats


@pytest.fixture
def world(tmp_path: Path, small_model: str) -> World:
    made = World(tmp_path / "run", small_model)
    made.rows("chats", conversations(200), tables.CONVERSATIONS)
    made.rows("talk", [{**row, "id": f"general-{row['id']}"} for row in documents(100, seed=5)], DOCUMENTS, "corpus")
    made.rows("pairs", preferences(60), tables.PREFERENCES, "preferences")
    return made


def sft(world: World, **changes: Any) -> SftStage:
    values = {
        "kind": "sft", "model": world.model, "input": {"chats": 0.9, "talk": 0.1}, "steps": 4, "learning_rate": 1e-2,
        "max_length": 96,
    }  # fmt: skip
    return SftStage.model_validate({**values, **changes})


def by_set(stats: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["set"]: row for row in stats["evaluation"]["sets"]}


def test_without_a_setting_held_out_rows_of_each_input_are_scored_and_never_trained_on(world: World) -> None:
    stats = world.train("chat", sft(world, steps=8, lora={"rank": 4}))
    found = by_set(stats)
    assert [(row["set"], row["role"], row["measure"]) for row in found.values()] == [
        ("chats", "domain", "loss"), ("talk", "general", "loss"),
    ]  # fmt: skip
    trained = set(shards_ids(world.inputs["chat"]))
    for name, share in stats["held_out_shares"].items():
        ids = shards_ids(world.inputs[name])
        held = {key for key, out in zip(ids, holdout.is_held_out(ids, 3, share), strict=True) if out}
        assert held and not held & trained
        assert found[name]["rows"] + found[name]["left_out"] == len(held)
    # What the numbers say is what the models on disk say of these rows.
    for side, path in (("before", world.model), ("after", world.inputs["chat"] + "/model")):
        model, tokenizer = models.load(path).eval(), models.load_tokenizer(path)
        for name, row in found.items():
            chosen = evaluation_sets.ScoredSet(
                name=name, measure="loss", inputs=[world.inputs[name]], held_out=stats["held_out_shares"][name], max_rows=128
            )
            items = evaluation_sets.read(chosen, 3)
            own = evaluation_sets.TrainedOn(
                stage="chat", input=name, directory=world.inputs[name], held_out=stats["held_out_shares"][name]
            )
            out = evaluation_sets.overlapping([(chosen, items)], [own], 3)
            items = [item for item in items if (name, item.id) not in out]
            scores = evaluation_sets.score(chosen, items, model, tokenizer, CONTEXT, 4096, torch.device("cpu"))
            expected = math.fsum(score["value"] for score in scores) / sum(score["tokens"] for score in scores)
            assert row[side] == pytest.approx(expected, abs=2e-4)
    assert found["chats"]["lost"] < 0 and any("domain set chats: gained" in line for line in world.lines)


def shards_ids(directory: str) -> list[str]:
    parts = shards.parts([directory])
    return [key for part in parts for _, batch in shards.read(part, ["id"]) for key in batch["id"].to_pylist()]


def test_the_model_before_is_scored_once_and_a_stopped_run_goes_on_to_the_same_numbers(world: World) -> None:
    group = Group(stop=2)
    stage = sft(world, steps=4)
    with pytest.raises(Cancelled, match="stopped after step 2"):
        world.train("chat", stage, group)
    assert group.notes.count("rows scored before training") == 2
    resumed = Group()
    stats = world.train("chat", stage, resumed)
    assert "rows scored before training" not in resumed.notes
    again = Group()
    other = world.train("other", sft(world, steps=4), again)
    assert "rows scored before training" not in again.notes  # another stage, the same model and sets
    assert other["evaluation"] == stats["evaluation"]
    assert (world.root / "other" / "f0" / "evaluation" / "before.json").exists()


def test_a_model_that_lost_more_than_the_bound_is_kept_but_refused_until_the_bound_is_raised(world: World) -> None:
    tight = {"most_lost": 0.0}
    stage = sft(world, steps=12, learning_rate=0.05, input={"chats": 0.99, "talk": 0.01}, evaluate=tight)
    world.train("chat", stage)
    directory = world.inputs["chat"]
    refused = stage.refusal(directory)
    assert refused is not None
    assert "lost more than evaluate.most_lost allows (0.0%): general set talk: lost" in refused and f"{directory}/model" in refused
    assert "domain set chats" in refused and models.exists(directory + "/model")
    assert sft(world, evaluate={"most_lost": 0.99}).refusal(directory) is None
    assert sft(world, evaluate={**tight, "override": "for a demonstration"}).refusal(directory) is None
    assert sft(world, evaluate=False).refusal(directory) is None


def test_a_bound_without_anything_to_measure_it_on_is_an_error_before_training(world: World) -> None:
    group = Group()
    with pytest.raises(SettingsError, match=r"evaluate\.most_lost .* there is no set to measure it on"):
        world.train("chat", sft(world, input="chats", evaluate={"most_lost": 0.1}), group)
    assert not group.notes
    with pytest.raises(ValidationError, match="a model from scratch has none"):
        PretrainStage.model_validate({"kind": "pretrain", "input": "tokens", "steps": 1, "evaluate": {"most_lost": 0.1}})
    with pytest.raises(ValidationError, match="both have a set 'a'"):
        sft(world, evaluate={"domain": {"a": {"input": "chats"}}, "general": {"a": {"input": "talk"}}})


def test_named_sets_of_every_kind_are_scored_and_rows_that_would_be_trained_on_are_refused(world: World, tmp_path: Path) -> None:
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text(
        json.dumps({"question": "什么会发光？", "choices": ["铜", "雨"], "answer": 0}, ensure_ascii=False)
        + "\n"
        + json.dumps({"question": "What glows?", "choices": ["The rain", "The copper"], "answer": "B"}),
        "utf-8",
    )
    general = {"quiz": {"choices": str(quiz)}, "pairs": {"input": "pairs", "max_rows": 12}}
    stats = world.train(
        "chat", sft(world, input="chats", evaluate={"domain": {"own": {"input": "chats", "held_out": 0.2}}, "general": general})
    )
    found = by_set(stats)
    assert {name: (row["role"], row["measure"], row["rows"]) for name, row in found.items() if name != "own"} == {
        "quiz": ("general", "accuracy", 2), "pairs": ("general", "accuracy", 12),
    }  # fmt: skip
    assert stats["held_out_shares"] == {"chats": 0.2}
    with pytest.raises(evaluation_sets.Overlap, match="stage 'again' was trained on rows of it"):
        world.train("again", sft(world, input="chats", evaluate={"domain": {"own": {"input": "chats"}}}))


def test_a_pair_is_right_where_the_chosen_reply_is_likelier(world: World) -> None:
    model, tokenizer = models.load(world.model).eval(), models.load_tokenizer(world.model)
    models.as_chat(tokenizer, model)
    chosen = evaluation_sets.ScoredSet(name="pairs", measure="accuracy", inputs=[world.inputs["pairs"]], max_rows=20)
    items = evaluation_sets.read(chosen, 0)
    scores = evaluation_sets.score(chosen, items, model, tokenizer, 512, 4096, torch.device("cpu"))
    for item, score in zip(items, scores, strict=True):
        sums = []
        for reply in (item.chosen, item.rejected):
            [head], [tail] = dpo.encode_replies(tokenizer, [item.messages], [reply])
            row = Row(np.array(head + tail), np.arange(len(head) + len(tail)) >= len(head))
            sums.append(float(log_probabilities(model, [row], 4096, torch.device("cpu"))[0]))
        assert score["value"] == float(sums[0] > sums[1])


def test_a_later_fine_tune_keeps_the_general_sets_of_the_model_it_starts_from(world: World) -> None:
    world.train("chat", sft(world))
    common = {"model": "chat", "steps": 2, "learning_rate": 1e-3, "max_length": 96}
    aligned = by_set(world.train("aligned", DpoStage.model_validate({**common, "kind": "dpo", "input": "pairs"})))
    assert {name: (row["role"], row["measure"], row.get("inherited")) for name, row in aligned.items()} == {
        "pairs": ("domain", "accuracy", None), "talk": ("general", "loss", "chat"),
    }  # fmt: skip
    first = by_set(shards.load_manifest(world.inputs["chat"]).stats)
    assert aligned["talk"]["before"] == pytest.approx(first["talk"]["after"], abs=2e-4)
    labelled = [{**row, "label": number % 3 > 0} for number, row in enumerate(conversations(80))]
    world.rows("marked", labelled, pa.schema([*tables.CONVERSATIONS, pa.field("label", pa.bool_())]))
    settled = by_set(
        world.train("settled", KtoStage.model_validate({**common, "kind": "kto", "model": "aligned", "input": "marked"}))
    )
    assert settled["talk"]["inherited"] == "chat" and settled["marked"]["measure"] == "loss"


def test_continued_pretraining_is_scored_on_what_the_pack_held_out(world: World, make_pack: Any) -> None:
    rows = documents(200, seed=9)
    world.rows("docs", rows, DOCUMENTS, "corpus")
    kept = [row for row, out in zip(rows, holdout.is_held_out([r["id"] for r in rows], 3, 0.1), strict=True) if not out]
    directory = make_pack(world.root / "tokens" / "f0", kept, 64)
    manifest = json.loads(Path(directory, "manifest.json").read_text())
    manifest |= {"config": {"holdout": 0.1}, "inputs": {"docs": "docs/f0"}}
    Path(directory, "manifest.json").write_text(json.dumps(manifest))
    world.inputs["tokens"] = directory
    stage = PretrainStage.model_validate(
        {
            "kind": "pretrain",
            "input": "tokens",
            "model": world.model,
            "steps": 6,
            "learning_rate": 3e-3,
            "evaluate": {"general": {}},
        }
    )
    row = by_set(world.train("more", stage))["tokens"]
    model, tokenizer = models.load(world.inputs["more"] + "/model").eval(), models.load_tokenizer(world.model)
    chosen = evaluation_sets.ScoredSet(name="tokens", measure="loss", inputs=[world.inputs["docs"]], held_out=0.1)
    items = evaluation_sets.read(chosen, 3)
    out = evaluation_sets.overlapping(
        [(chosen, items)],
        [evaluation_sets.TrainedOn(stage="more", input="docs", directory=world.inputs["docs"], held_out=0.1)],
        3,
    )
    scores = evaluation_sets.score(
        chosen, [i for i in items if (chosen.name, i.id) not in out], model, tokenizer, CONTEXT, 4096, torch.device("cpu")
    )
    assert row["after"] == pytest.approx(math.fsum(s["value"] for s in scores) / sum(s["tokens"] for s in scores), abs=2e-4)
    assert row["lost"] < 0 and row["role"] == "domain"


def test_promotion_reads_what_the_stage_itself_has_measured(world: World) -> None:
    world.train("chat", sft(world, steps=12, learning_rate=0.05, input={"chats": 0.99, "talk": 0.01}))

    def promote(bound: float) -> StageContext:
        context = StageContext(
            "good", "promote", str(world.root / "good" / "f0"), "f0", {}, {"chat": world.inputs["chat"]}, 3
        )  # fmt: skip
        PromoteStage.model_validate({"kind": "promote", "model": "chat", "max_loss": bound}).run(context)
        return context

    with pytest.raises(SettingsError, match="chat is not promoted: on talk it lost"):
        promote(0.0)
    assert shards.load_manifest(promote(0.999).directory).stats["promoted"] == "chat"


@pytest.mark.parametrize(("rows", "share"), [(19, 0.0), (20, 0.1), (100, 0.08), (1000, 0.05), (12800, 0.01)])
def test_little_is_held_out_of_large_inputs_and_nothing_of_tiny_ones(rows: int, share: float) -> None:
    assert sets.rows_kept_out(rows) == pytest.approx(share)


def test_training_can_be_stopped_while_the_model_before_is_scored(world: World) -> None:
    class Impatient(Group):
        def run(self, job: dict[str, Any], *_: Any) -> dict[str, Any]:
            model, function = jobs.load(job["kind"])
            return dict(function(parse(model, job["config"], "sft"), job["directory"], Workers(report=lambda *_: True)))

    with pytest.raises(Cancelled, match="rows scored before training"):
        world.train("chat", sft(world), Impatient())


def _worker(rank: int, port: int, told: list[tuple[str, dict[str, Any], str]]) -> None:
    """Do jobs (kind, settings, directory) as one of two workers."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    workers = Workers.here()
    for kind, values, directory in told:
        model, function = jobs.load(kind)
        function(parse(model, values, kind), directory, workers)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_scores_are_the_same_on_one_worker_and_on_two_under_every_layout(world: World, make_pack: Any) -> None:
    told: list[tuple[str, dict[str, Any], str]] = []
    expected: list[dict[str, Any]] = []
    group = Group()
    for name, changes in (("full", {}), ("lora", {"lora": {"rank": 4}})):
        expected += [world.train(name, sft(world, steps=4, learning_rate=1e-3, **changes), group)["evaluation"]] * 2
        for sharding in ("ddp", "fsdp2"):
            config = {**group.job["config"], "sharding": sharding}
            config["comparison"] = {**config["comparison"], "cache": None}
            told.append(("sft", config, str(world.root / f"{name}-{sharding}" / "f0")))
    talk = {"name": "talk", "measure": "loss", "inputs": [world.inputs["talk"]], "role": "domain", "max_rows": 21}
    pretraining = {
        "inputs": [{"name": "tokens", "directory": make_pack(world.root / "tokens" / "f0", documents(200, seed=9), 64)}],
        "model": world.model, "steps": 4, "learning_rate": 1e-3, "comparison": {"sets": [talk]},
    }  # fmt: skip
    one = group.run({"kind": "pretrain", "config": pretraining, "directory": str(world.root / "alone" / "f0")})["evaluation"]
    for layout in ({"sharding": "ddp"}, {"sharding": "fsdp2"}, {"sharding": "none", "tensor": 2}):
        expected.append(one)
        told.append(("pretrain", {**pretraining, "parallel": layout}, str(world.root / f"pre-{len(told)}" / "f0")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context: Any = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_worker, args=(rank, port, told), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0]
    for (_, _, directory), wanted in zip(told, expected, strict=True):
        found = json.loads(Path(directory, "result.json").read_text())["evaluation"]
        assert [row["set"] for row in found["sets"]] == [row["set"] for row in wanted["sets"]]
        for row, other in zip(found["sets"], wanted["sets"], strict=True):
            assert (row["before"], row["after"]) == pytest.approx((other["before"], other["after"]), abs=2e-4)
