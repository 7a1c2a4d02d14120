"""Scores of a real (tiny) Hugging Face classifier: equal to asking it row by row, on a pool, in English and Chinese."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from operators import shards
from operators.config import SettingsError
from operators.quality.model_scorer import Classifier, Scoring, batches_by_length
from pipelines.stages.quality import ScoreStage
from tests.operators.dedup.corpus import context_of, directory_of, write_corpus

TEXTS = ["", "cat", "the cat sat on the mat", "丹炉 炼 丹", "dog " * 400, "the 炉", "mat\x00mat", "cat " * 7]


@pytest.fixture(scope="module")
def classifier_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("classifier")
    words = ["[PAD]", "[UNK]", "the", "cat", "sat", "on", "mat", "dog", "丹炉", "炼", "丹", "炉"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(directory)
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)
    return directory


def _scoring(directory: Path, label: str | None = "good") -> Scoring:
    return Scoring(str(directory), "quality", label, "auto", 32, 64, "cpu", None)


def _one_by_one(directory: Path, texts: list[str]) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    found = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        if ids["input_ids"].shape[1] == 0:
            found.append(float("nan"))
            continue
        with torch.no_grad():
            found.append(model(**ids).logits.softmax(-1)[0, 1].item())
    return np.array(found)


def test_batches_by_length_give_the_scores_of_single_texts(classifier_directory: Path) -> None:
    scores = Classifier(_scoring(classifier_directory)).score(TEXTS)
    expected = _one_by_one(classifier_directory, TEXTS)
    np.testing.assert_allclose(scores, expected, atol=2e-4)
    assert np.nanstd(expected) > 0.01  # the model tells them apart
    assert np.isnan(scores[0]) and np.isnan(Classifier(_scoring(classifier_directory)).score([""])).all()


def test_a_batch_never_holds_more_tokens_than_asked_for() -> None:
    lengths = np.array([5, 900, 1, 30, 30, 2, 64])
    found = list(batches_by_length(lengths, 64))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    assert all(len(rows) == 1 or lengths[rows].max() * len(rows) <= 64 for rows in found)


def test_a_wrong_label_or_directory_is_told_with_what_there_is(classifier_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no label 'fine'; it has \['bad', 'good'\]"):
        Classifier(_scoring(classifier_directory, "fine"))
    with pytest.raises(SettingsError, match="say by `label`"):
        Classifier(_scoring(classifier_directory, None))
    with pytest.raises(SettingsError, match="no sequence classifier"):
        Classifier(_scoring(tmp_path))


@pytest.mark.usefixtures("ray_cluster")
def test_the_stage_adds_the_column_and_rejects_what_is_below_the_minimum(classifier_directory: Path, tmp_path: Path) -> None:
    texts = [TEXTS[1 + index % (len(TEXTS) - 1)] for index in range(89)]
    table = pa.table({"id": [f"d{i}" for i in range(89)], "text": pa.array(texts, pa.large_string()), "source": ["t"] * 89})
    web = write_corpus(tmp_path, "web", table, 40)
    expected = Classifier(_scoring(classifier_directory)).score(texts)
    middle = float(np.median(expected))
    stage = ScoreStage(
        kind="score", input="web", model=str(classifier_directory), label="good", max_tokens=32, batch_tokens=64, minimum=middle
    )
    context = context_of(tmp_path, "scored", {"web": web})
    stage.run(context)
    manifest = shards.load_manifest(context.directory)
    rows = [
        row
        for part in shards.parts([str(directory_of(tmp_path, "scored"))])
        for _, batch in shards.read(part)
        for row in batch.to_pylist()
    ]
    kept = expected >= np.float32(middle)
    assert [row["id"] for row in rows] == [f"d{i}" for i in np.flatnonzero(kept)]
    assert np.abs(np.array([row["quality"] for row in rows]) - expected[kept]).max() < 2e-4
    assert manifest.ledger.to_json() == {
        "in": 89, "created": 0, "kept": int(kept.sum()), "rejected": {"score:low": int((~kept).sum())}, "quarantined": 0,
    }  # fmt: skip
