"""The n-gram kernel against datatrove's definition in plain Python."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.text.analysis import Analysis
from operators.text.ngrams import measure_grams

WORDS = st.sampled_from(["a", "b", "ab", "ba", "bab", "的", "中文", "a,", "longer-word", "x" * 70, "é"])


def reference(words: list[str], total: int) -> list[float]:
    out = []
    for n in range(2, 5):
        grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        best = Counter(grams).most_common(1)
        out.append(len(best[0][0]) * best[0][1] / total if best else 0.0)
    for n in range(5, 11):
        seen, repeated, i = set(), 0, 0
        while i + n <= len(words):
            gram = "".join(words[i : i + n])
            if gram in seen:
                repeated += len(gram)
                i += n
            else:
                seen.add(gram)
                i += 1
        out.append(repeated / total if total else 0.0)
    return out


def measured(texts: list[str]) -> tuple[np.ndarray, Analysis]:
    found = Analysis.of(pa.array(texts, pa.large_string()))
    words, out = found.words, np.empty((9, len(texts)))
    measure_grams(words.first, words.last, words.length, words.characters, words.hash, found.characters, out)
    return out, found


@given(st.lists(st.lists(WORDS, max_size=60).map(" ".join), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_fractions_equal_the_plain_definition(texts: list[str]) -> None:
    out, found = measured(texts)
    for row, text in enumerate(texts):
        bounds = range(found.words.first[row], found.words.last[row])
        starts, lengths = found.words.start, found.words.length
        words = [found.data[starts[i] : starts[i] + lengths[i]].tobytes().decode() for i in bounds]
        assert out[:, row].tolist() == reference(words, len(text)), words


def test_long_texts_with_few_repeats_equal_the_plain_definition() -> None:
    generator = np.random.default_rng(2)
    texts = [" ".join(f"w{k}" for k in generator.integers(0, size, 3000)) for size in (60, 1500, 100000)]
    out, _ = measured(texts)
    for row, text in enumerate(texts):
        assert out[:, row].tolist() == reference(text.split(), len(text))
