"""Named sets: scores against a plain computation, overlap with training data, what was gained and lost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from operators import tables
from operators.tokens.holdout import is_held_out
from tests.train.conftest import conversations, write_rows
from train import evaluate, evaluation_sets, models, retention
from train.parallel import Workers
from train.settings_evaluate import EvaluateJob, NamedModel, ScoredSet, TrainedOn

QUESTIONS = [
    {"id": "a", "question": "What glows?", "choices": ["copper in the furnace", "rain"], "answer": "A", "lang": "en"},
    {"id": "b", "question": "什么会发光？", "choices": ["雨", "炉火里的铜"], "answer": 1, "lang": "zh"},
    {"id": "c", "question": "What falls?", "choices": ["rain", "sand"], "answer": "rain"},
]


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("run") / "talks" / "f0", "conversations", conversations(12), tables.CONVERSATIONS)


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("files") / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in QUESTIONS), encoding="utf-8")
    return str(path)


def scored(**values: Any) -> ScoredSet:
    return ScoredSet(**{"name": "general", "measure": "loss", **values})


def test_sets_are_scored_like_a_plain_computation_one_row_at_a_time(
    small_model: str, talks: str, choices: str, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    job = EvaluateJob(
        models=[NamedModel(name="base", path=small_model), NamedModel(name="same", path=small_model)],
        sets=[scored(inputs=[talks]), scored(name="facts", measure="accuracy", choices=[choices])],
        length=64, before={"same": "base"}, retention={"base": "general", "same": "facts"},
    )  # fmt: skip
    result = evaluate.run(job, str(tmp_path / "scores" / "f0"), Workers())
    model, tokenizer = models.load(small_model).eval(), models.load_tokenizer(small_model)
    chat = bool(tokenizer.chat_template)

    def logs(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits.log_softmax(-1)[0]

    right = 0
    for row in QUESTIONS:
        means = []
        for choice in row["choices"]:
            head = row["question"]
            if chat:
                head = tokenizer.apply_chat_template(
                    [{"role": "user", "content": head}], tokenize=False, add_generation_prompt=True
                )
            lead = " " if not chat and row["question"][-1].isascii() else ""
            start, tail = tokenizer(head)["input_ids"], tokenizer(lead + choice)["input_ids"]
            ids, table = start + tail, logs(start + tail)
            means.append(sum(float(table[t - 1, ids[t]]) for t in range(len(start), len(ids))) / len(choice.encode()))
        answer = row["answer"]
        place = row["choices"].index(answer) if answer in row["choices"] else (0 if answer == "A" else answer)
        right += means.index(max(means)) == place
    models.as_chat(tokenizer, model)
    nats = tokens = 0.0
    for row in conversations(12):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, marks = text["input_ids"][:64], text["assistant_masks"][:64]
        table = logs(ids)
        for t in range(1, len(ids)):
            if marks[t]:
                nats -= float(table[t - 1, ids[t]])
                tokens += 1
    found = {(row["model"], row["set"]): row for row in result["sets"]}
    assert found["base", "general"]["value"] == pytest.approx(nats / tokens, rel=1e-4)
    assert found["base", "general"]["tokens"] == tokens
    assert found["base", "facts"]["value"] == pytest.approx(right / 3, abs=1e-6)
    assert [(row["set"], row["lost"]) for row in result["changes"]] == [("general", 0.0), ("facts", 0.0)]
    assert result["retention"]["sets"] == ["general", "facts"] and result["retention"]["average_forgetting"] == 0.0
    cells = pq.read_table(tmp_path / "scores" / "f0" / "retention.parquet").to_pylist()
    assert [[c["score"] for c in cells if c["order"] == place] for place in (0, 1)] == result["retention"]["scores"]
    assert [(c["set"], c["learnt"], c["forgotten"]) for c in cells if c["order"] == 0] == [
        ("general", cells[0]["score"], 0.0), ("facts", None, None),
    ]  # fmt: skip


def test_a_set_that_was_trained_on_is_refused_and_rows_are_named(talks: str) -> None:
    chosen = scored(inputs=[talks])
    trained = [TrainedOn(stage="chat", input="talks", directory=talks)]
    items = evaluation_sets.read(chosen, 0)
    with pytest.raises(evaluation_sets.Overlap, match=r"'general': stage 'chat' was trained on rows of it, 'chat-0', .*held_out"):
        evaluation_sets.refuse_overlap([(chosen, items)], trained, 0)
    evaluation_sets.refuse_overlap([(chosen.model_copy(update={"allow_overlap": True}), items)], trained, 0)


def test_rows_that_training_held_out_are_no_overlap_and_a_copy_under_another_id_is_one(talks: str, tmp_path: Path) -> None:
    held = scored(inputs=[talks], held_out=0.5)
    items = evaluation_sets.read(held, 3)
    ids = [row["id"] for row in conversations(12)]
    assert {item.id for item in items} == {key for key, out in zip(ids, is_held_out(ids, 3, 0.5), strict=True) if out}
    evaluation_sets.refuse_overlap([(held, items)], [TrainedOn(stage="c", input="talks", directory=talks, held_out=0.5)], 3)
    copies = [{**row, "id": f"copy-{row['id']}"} for row in conversations(12)]
    for row in copies:
        row["messages"] = [{**turn, "content": turn["content"].upper() + "  "} for turn in row["messages"]]
    directory = write_rows(tmp_path / "copies" / "f0", "conversations", copies, tables.CONVERSATIONS)
    with pytest.raises(evaluation_sets.Overlap, match="copy-chat-"):
        evaluation_sets.refuse_overlap([(held, items)], [TrainedOn(stage="c", input="copies", directory=directory)], 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "choices": ["a"], "answer": "a"}', "line 1: `choices` must be at least two"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "C"}', "line 1: `answer` must be one of"),
        ('{"question": "q", ', "line 1 is no JSON"),
        ("", "has no rows"),
    ],
)
def test_a_bad_question_is_named_by_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        evaluation_sets.read(scored(measure="accuracy", choices=[str(path)]), 0)


def test_a_cap_draws_the_same_rows_each_time_and_no_others(talks: str) -> None:
    whole = [item.id for item in evaluation_sets.read(scored(inputs=[talks]), 0)]
    assert [item.id for item in evaluation_sets.read(scored(inputs=[talks], max_rows=5), 0)] == whole[:5]


def test_what_is_kept_is_a_ratio_of_accuracies_or_of_perplexities() -> None:
    assert retention.kept(0.8, 0.6, "accuracy") == pytest.approx(0.75)
    assert retention.kept(math.log(10), math.log(12.5), "loss") == pytest.approx(0.8)
    assert retention.kept(0.0, 0.5, "accuracy") == 1.0


def test_a_retention_matrix_gives_forgetting_and_backward_transfer_by_hand() -> None:
    grid = {"m1": (0.9, 0.2, 0.1), "m2": (0.7, 0.8, 0.3), "m3": (0.6, 0.9, 0.95)}
    scores = [
        {"model": model, "set": name, "measure": "accuracy", "value": value}
        for model, values in grid.items()
        for name, value in zip(("a", "b", "c"), values, strict=True)
    ]
    found = retention.matrix(scores, {"m1": "a", "m2": "b", "m3": "c"})
    assert found["scores"] == [list(values) for values in grid.values()]
    assert found["backward_transfer"] == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert found["average_forgetting"] == pytest.approx(((0.9 - 0.6) + (0.8 - 0.9)) / 2)
