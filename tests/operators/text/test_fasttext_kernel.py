"""The compiled fastText prediction against the fasttext module itself."""

from __future__ import annotations

import json
from pathlib import Path

import fasttext
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.text import fasttext_kernel, fasttext_model
from operators.text.analysis import Analysis
from operators.text.language import DetectLanguage, predict_windows


def both(path: str, texts: list[str], count: int) -> tuple[list[tuple[list[str], np.ndarray]], list[tuple[list[str], np.ndarray]]]:
    """The best labels and probabilities of each text by the kernel and by the module."""
    found = Analysis.of(pa.array(texts, pa.large_string()))
    kernel = fasttext_model.compiled(path)
    assert kernel is not None
    answer = kernel.predict(found.data, found.starts, found.ends, count)
    ours = [
        ([kernel.labels[k] for k in label if k >= 0], row[label >= 0])
        for label, row in zip(answer.label, answer.probability, strict=True)
    ]
    lines = ["".join(c if c > " " else " " for c in text) for text in texts]
    labels, scores = fasttext_model.predict(fasttext_model.load(path), lines, count)
    return ours, list(zip(labels, scores, strict=True))


def check(path: str, texts: list[str], count: int = 4) -> None:
    for text, (labels, scores), (wanted, expected) in zip(texts, *both(path, texts, count), strict=True):
        assert labels[0] == wanted[0] or abs(scores[0] - expected[0]) < 1e-4 > abs(expected[0] - expected[1]), text[:200]
        assert np.allclose(scores, expected[: len(scores)], atol=1e-4), text[:200]
        assert (expected[len(scores) :] < 1e-4).all(), text[:200]


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_text_is_labelled_as_by_fasttext(texts: list[str]) -> None:
    check(fasttext_model.packaged_language_model(), [*texts, " ".join(texts)])


def test_words_with_a_meaning_to_fasttext_are_read_as_it_reads_them() -> None:
    check(
        fasttext_model.packaged_language_model(),
        ["</s> bonjour", "bonjour </s> le monde", "__label__en bonjour", "", "\x00\x01", "a" * 5000, "中文" * 3000, "de in and la"],
    )


def test_real_documents_are_labelled_as_by_fasttext(data_pack: Path) -> None:
    path = fasttext_model.packaged_language_model()
    for name in ("en", "zh", "other"):
        texts = pq.read_table(data_pack / "corpus" / f"{name}.parquet", columns=["text"])["text"]
        check(path, texts.take(pa.array(range(0, len(texts), 40))).to_pylist())


@pytest.mark.slow
def test_all_documents_and_sentences_are_labelled_as_by_fasttext(data_pack: Path) -> None:
    path = fasttext_model.packaged_language_model()
    for name in ("en", "zh", "other"):
        check(path, pq.read_table(data_pack / "corpus" / f"{name}.parquet", columns=["text"])["text"].to_pylist())
    for name in ("sentences", "short_tech"):
        lines = (data_pack / "langid" / f"{name}.jsonl").read_text("utf-8").splitlines()
        check(path, [json.loads(line)["text"] for line in lines])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small models of other shapes than lid.176: losses, n-gram lengths, dense or quantised."""
    folder = tmp_path_factory.mktemp("models")
    lines = [f"__label__{'ab'[i % 2]} {'red green' if i % 2 else 'one two three'} word{i % 7} café 中文{i % 3}" for i in range(200)]
    (folder / "train.txt").write_text("\n".join(lines) + "\n", "utf-8")
    paths = {}
    for name, options in {
        "softmax": {"loss": "softmax", "minn": 1, "maxn": 3},
        "hs": {"loss": "hs", "minn": 2, "maxn": 4},
        "words": {"loss": "softmax", "minn": 0, "maxn": 0},
        "bigrams": {"loss": "softmax", "wordNgrams": 2},
        "ova": {"loss": "ova"},
    }.items():
        model = fasttext.train_supervised(
            str(folder / "train.txt"), dim=8, epoch=3, bucket=1000, thread=1, verbose=0, seed=3, **options
        )
        paths[name] = str(folder / f"{name}.bin")
        model.save_model(paths[name])
    return paths


@pytest.mark.parametrize("name", ["softmax", "hs", "words"])
def test_dense_models_of_either_softmax_are_read(trained: dict[str, str], name: str) -> None:
    check(trained[name], ["red green word1", "one two three café", "中文1 new words", "", "x"], 2)


@pytest.mark.parametrize("name", ["bigrams", "ova"])
def test_other_models_are_asked_through_the_module(trained: dict[str, str], name: str) -> None:
    assert fasttext_model.compiled(trained[name]) is None
    labels = DetectLanguage(model=trained[name]).measure(pa.table({"text": ["one two three word1", "red\ngreen"]}))["lang"]
    assert labels.to_pylist() == ["a", "b"]


def test_a_damaged_model_says_so(tmp_path: Path) -> None:
    data = Path(fasttext_model.packaged_language_model()).read_bytes()
    for size in (70, 5000, len(data) - 100):
        with pytest.raises(ValueError, match="fastText model"):
            fasttext_kernel.Classifier(data[:size])
    assert not fasttext_kernel.supports(b"no model at all")


def test_windows_of_a_mixed_text_have_their_own_languages() -> None:
    english = "The committee will meet again next week to discuss the report. " * 20
    chinese = "委员会将于下周再次开会，讨论这份关于城市交通的报告。" * 40
    found = Analysis.of(pa.array([english[:800] + chinese[:800], "", english[:100]]))
    windows = predict_windows(found, 400, 4)
    names = [windows.labels[label] if label >= 0 else None for label in windows.label]
    assert windows.windows.offsets.tolist() == [0, 4, 5, 6]
    assert names == ["en", "en", "zh", "zh", None, "en"]
    assert (windows.probability[windows.label >= 0] > 0.8).all()
