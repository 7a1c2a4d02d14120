"""A document quality classifier: fastText, trained on named good and bad documents (as CCNet, GPT-3 and FineWeb-Edu's
cheap relatives do; Joulin et al. 2016, arXiv:1607.01759), on one thread, so that equal input gives equal bytes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.text import fasttext_model
from operators.text.analysis import Analysis

GOOD, BAD = "good", "bad"
_BATCH = 512
_ATTEMPTS = 4


class ClassifierSettings(Settings):
    """How documents become fastText lines, and how it trains."""

    unit: Literal["words", "characters"] = Field(default="words", description="what a token of Chinese is; others have words")
    max_characters: int = Field(default=5000, ge=100, description="characters of a document that are read, from its start")
    dimension: int = Field(default=16, ge=1, description="size of the vectors")
    epochs: int = Field(default=25, ge=1, description="passes over the documents")
    learning_rate: float = Field(default=0.5, gt=0, description="at the start; it falls linearly to 0")
    ngrams: int = Field(default=2, ge=1, le=5, description="longest n-gram of tokens")
    buckets: int = Field(default=200_000, ge=1, description="hash buckets of the n-grams")
    min_count: int = Field(default=2, ge=1, description="rarer tokens are left out")
    held_out: float = Field(default=0.1, gt=0, lt=1, description="share of documents, chosen by hash, that only test")


def normalise(texts: pa.Array | pa.ChunkedArray, unit: str, max_characters: int) -> pa.Array:
    """Texts as fastText lines: lower case, digits as 0, words (Chinese: jieba's or characters) joined by spaces."""
    lowered = pc.utf8_lower(pc.utf8_slice_codeunits(texts.cast(pa.large_string()), 0, max_characters))
    found = Analysis.of(lowered)
    words = found.words
    offsets = np.zeros(len(found) + 1, np.int64)
    room = int((found.ends - found.starts).sum()) * 2 + len(found) + 1
    out = np.empty(room, np.uint8)
    _join(found.data, words.first, words.last, words.start, words.length, unit == "characters", out, offsets)
    return pa.Array.from_buffers(pa.large_string(), len(found), [None, pa.py_buffer(offsets), pa.py_buffer(out[: offsets[-1]])])


@numba.njit(cache=True, nogil=True)
def _join(data, first, last, start, length, characters, out, offsets):  # type: ignore[no-untyped-def]
    used = 0
    for row in range(len(first)):
        for word in range(first[row], last[row]):
            for i in range(start[word], start[word] + length[word]):
                byte = data[i]
                wide = 0xE3 <= byte <= 0xE9  # the first byte of a character of U+3000..U+9FFF
                if used > offsets[row] and (i == start[word] or (characters and wide)):
                    out[used] = 32
                    used += 1
                # control characters would end the line or the document for fastText
                out[used] = 48 if 48 <= byte <= 57 else (32 if byte < 32 else byte)
                used += 1
        offsets[row + 1] = used


def train_classifier(
    good: Iterable[str], bad: Iterable[str], out_path: str, seed: int = 0, settings: ClassifierSettings | None = None
) -> dict[str, Any]:
    """Train on texts, streamed, and write the model to the local file `out_path`.

    A document is held out by the hash of its text, so that copies stay on one side. Returns {"documents": {label: n},
    "held_out": n, "accuracy": x, "accuracy_by_language": {lang: x}, "held_out_by_language": {lang: n}, "attempts": n}.
    Raises ValueError when a side has no document, RuntimeError when training diverges four times.
    """
    settings = settings or ClassifierSettings()
    with tempfile.TemporaryDirectory() as directory:
        paths = {name: os.path.join(directory, name) for name in ("train", "test", "languages")}
        counts = _write(good, bad, paths, settings, seed)
        for label in (GOOD, BAD):
            if not counts[f"train:{label}"]:
                raise ValueError(f"no {label} document to train the quality classifier on (documents given: {counts[label]})")
        attempts = _train(paths["train"], out_path, seed, settings)
        scores = _evaluate(out_path, paths)
    return {"documents": {label: counts[label] for label in (GOOD, BAD)}, "attempts": attempts, **scores}


def _write(good: Iterable[str], bad: Iterable[str], paths: dict[str, str], settings: ClassifierSettings, seed: int) -> Counter[str]:
    """Training lines, held-out lines and the languages of the latter; both labels alternate batch by batch."""
    counts: Counter[str] = Counter()
    sides = {GOOD: iter(good), BAD: iter(bad)}
    with (
        open(paths["train"], "w", encoding="utf-8", newline="\n") as train,
        open(paths["test"], "w", encoding="utf-8", newline="\n") as test,
        open(paths["languages"], "w", encoding="utf-8", newline="\n") as languages,
    ):
        while sides:
            for label in list(sides):
                texts = list(islice(sides[label], _BATCH))
                if not texts:
                    del sides[label]
                    continue
                column = pa.array(texts, pa.large_string())
                guesses = Analysis.of(column).language_guess.to_pylist()
                lines = normalise(column, settings.unit, settings.max_characters).to_pylist()
                for text, line, language in zip(texts, lines, guesses, strict=True):
                    counts[label] += 1
                    if _is_held_out(text, settings.held_out, seed):
                        test.write(f"{fasttext_model.LABEL}{label} {line}\n")
                        languages.write(f"{language}\n")
                        counts[f"test:{label}"] += 1
                    else:
                        train.write(f"{fasttext_model.LABEL}{label} {line}\n")
                        counts[f"train:{label}"] += 1
    return counts


def _is_held_out(text: str, share: float, seed: int) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "big", signed=True))
    return int.from_bytes(digest.digest(), "big") < share * 2**64


def _train(train: str, out_path: str, seed: int, settings: ClassifierSettings) -> int:
    """Train and save; a divergence to NaN is tried again at half the learning rate. Returns the attempts it took."""
    import fasttext

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            model = fasttext.train_supervised(
                input=train, dim=settings.dimension, epoch=settings.epochs, lr=settings.learning_rate / 2 ** (attempt - 1),
                wordNgrams=settings.ngrams, bucket=settings.buckets, minCount=settings.min_count, minn=0, maxn=0,
                loss="softmax", thread=1, seed=seed & 0x7FFFFFFF, verbose=0,
            )  # fmt: skip
        except RuntimeError as error:
            if "nan" not in str(error).lower():
                raise
            continue
        if not np.isfinite(model.f.getOutputMatrix()).all():
            continue
        os.makedirs(os.path.dirname(os.path.abspath(out_path)), exist_ok=True)
        model.save_model(out_path)
        return attempt
    raise RuntimeError(f"the quality classifier diverged {_ATTEMPTS} times; lower learning_rate ({settings.learning_rate})")


def _evaluate(model_path: str, paths: dict[str, str]) -> dict[str, Any]:
    """Accuracy on the held-out documents at a threshold of one half, by guessed language."""
    model = fasttext_model.load(model_path)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    with open(paths["test"], encoding="utf-8", newline="\n") as test, open(paths["languages"], encoding="utf-8") as languages:
        for batch in _batches(zip(test, languages, strict=True)):
            labels, lines = zip(*(line.rstrip("\n").split(" ", 1) for line, _ in batch), strict=True)
            predicted, _ = fasttext_model.predict(model, lines, 1)
            for label, found, (_, language) in zip(labels, predicted, batch, strict=True):
                total[language.strip()] += 1
                right[language.strip()] += bool(found) and found[0] == label.removeprefix(fasttext_model.LABEL)
    return {
        "held_out": total.total(),
        "accuracy": round(right.total() / total.total(), 6) if total else 0.0,
        "accuracy_by_language": {code: round(right[code] / total[code], 6) for code in sorted(total)},
        "held_out_by_language": dict(sorted(total.items())),
    }


def _batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
