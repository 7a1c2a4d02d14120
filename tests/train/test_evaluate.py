"""Evaluation against a plain computation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from operators.tokens.holdout import is_held_out
from tests.train.conftest import documents, preferences
from train import dpo, evaluate, models
from train.parallel import Workers
from train.settings_evaluate import EvaluateJob, NamedModel, Prompt


def job(model: str, corpus: str, pairs: str, **changes: Any) -> EvaluateJob:
    values = {
        "models": [NamedModel(name="base", path=model)], "documents": [corpus], "held_out": 0.1, "length": 32,
        "pairs": [pairs], "pairs_held_out": 0.3, "max_new_tokens": 8,
        "prompts": [Prompt(text="炉火", lang="zh"), Prompt(text="The furnace", lang="en")],
    }  # fmt: skip
    return EvaluateJob(**{**values, **changes})


@pytest.fixture(scope="module")
def result(small_model: str, corpus: str, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    return evaluate.run(job(small_model, corpus, pairs), str(tmp_path_factory.mktemp("run") / "scores" / "f0"), Workers())


def test_perplexity_is_that_of_a_plain_computation_on_the_held_out_documents(result: dict[str, Any], small_model: str) -> None:
    rows = documents(400)
    held = [row for row, out in zip(rows, is_held_out([row["id"] for row in rows], 0, 0.1), strict=True) if out]
    model, tokenizer = models.load(small_model).eval(), models.load_tokenizer(small_model)
    nats: dict[str, float] = {"en": 0.0, "zh": 0.0}
    counts = {"en": 0, "zh": 0}
    for row in held:
        ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, 31):
            window = torch.tensor([ids[start : start + 32]])
            with torch.no_grad():
                loss = model(window, labels=window, use_cache=False).loss
            nats[row["lang"]] += float(loss) * (window.shape[1] - 1)
            counts[row["lang"]] += window.shape[1] - 1
    for lang in ("en", "zh"):
        [line] = [row for row in result["perplexity"] if (row["lang"], row["source"]) == (lang, "*")]
        assert line["documents"] == sum(row["lang"] == lang for row in held)
        assert line["tokens"] == counts[lang]
        assert line["perplexity"] == pytest.approx(math.exp(nats[lang] / counts[lang]), rel=1e-4)
    assert {row["source"] for row in result["perplexity"]} == {"*", "src-0", "src-1", "src-2"}


def test_preference_accuracy_is_that_of_a_plain_computation(result: dict[str, Any], small_model: str) -> None:
    rows = preferences(60)
    held = [row for row, out in zip(rows, is_held_out([row["id"] for row in rows], 0, 0.3), strict=True) if out]
    model, tokenizer = models.load(small_model).eval(), models.load_tokenizer(small_model)
    models.as_chat(tokenizer, model)
    from operators import tables

    prompts, *sides = dpo.encode_pairs(tokenizer, pa.RecordBatch.from_pylist(held, schema=tables.PREFERENCES))
    right = 0
    for number, prompt in enumerate(prompts):
        sums = []
        for side in sides:
            head = prompt[-max(1, 32 - len(side[number])) :]
            ids = torch.tensor([(head + side[number])[:32]])
            with torch.no_grad():
                logs = model(ids, use_cache=False).logits.log_softmax(-1)[0]
            sums.append(sum(float(logs[t - 1, ids[0, t]]) for t in range(len(head), ids.shape[1])))
        right += sums[0] > sums[1]
    assert result["preference_pairs"] == len(held)
    assert result["preference_accuracy"] == {"base": pytest.approx(right / len(held), abs=1e-6)}


def test_replies_stand_side_by_side_in_the_order_of_prompts(result: dict[str, Any]) -> None:
    assert [row["prompt"] for row in result["samples"]] == ["炉火", "The furnace"]
    assert all(row["replies"]["base"] for row in result["samples"])


def test_accuracy_against_a_reference_counts_margins_that_grew(small_model: str, corpus: str, pairs: str, tmp_path: Path) -> None:
    both = [NamedModel(name="base", path=small_model), NamedModel(name="same", path=small_model)]
    found = evaluate.run(job(small_model, corpus, pairs, models=both, reference="base", prompts=[]), str(tmp_path / "s"), Workers())
    assert found["preference_accuracy_vs_reference"] == {"same": 0.0}
    assert found["preference_accuracy"]["same"] == found["preference_accuracy"]["base"]


def test_a_cap_of_documents_keeps_the_same_ones_each_time(small_model: str, corpus: str, pairs: str, tmp_path: Path) -> None:
    capped = [
        evaluate.run(job(small_model, corpus, pairs, max_documents=3, prompts=[]), str(tmp_path / name), Workers())["perplexity"]
        for name in ("a", "b")
    ]
    assert capped[0] == capped[1]
    assert [row["documents"] for row in capped[0] if row["source"] == "*"] == [6, 3, 3]


def test_nothing_held_out_is_an_error_that_says_what_to_do(small_model: str, corpus: str, pairs: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 400 documents is held out .* raise `held_out`"):
        evaluate.run(job(small_model, corpus, pairs, held_out=1e-9), str(tmp_path / "run"), Workers())
