"""The plain shingle definition against a few lines of Python."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from operators.dedup.definitions import plain_table, resolve_units
from operators.dedup.keys import document_shingles, document_signatures
from operators.dedup.normalise import AUTO, CHARACTERS, WORDS
from operators.dedup.options import DedupOptions
from operators.dedup.reference import shingles

NUL = "\U0010ffff"  # what U+0000 is compared as


def naive(text: str, unit: int, n: int) -> list[tuple[str, ...]]:
    lowered = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    tokens = re.findall(r"\w+", lowered) if unit == WORDS else list(re.sub(r"\s+", "", lowered).replace("\0", NUL))
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@settings(max_examples=80, deadline=None)
@given(any_text, st.integers(1, 4))
@example("Ünï_code 12 \0 \x1f\x07 你好，世界。a\u0301 \u1100\u1161 ١٢", 2)
def test_plain_shingles_are_runs_of_words_or_of_everything_but_whitespace(text: str, n: int) -> None:
    for unit in (WORDS, CHARACTERS):
        assert shingles(text, n, n, unit, keep_digits=True, table=plain_table(unit)) == naive(text, unit, n)


@settings(max_examples=60, deadline=None)
@given(st.lists(any_text, min_size=1, max_size=5), st.lists(st.sampled_from(["en", "zh", None]), min_size=5, max_size=5))
def test_kernel_and_reference_sign_plain_shingles_alike(texts: list[str], langs: list[str | None]) -> None:
    batch = pa.table({"text": pa.array(texts, pa.large_string()), "lang": pa.array(langs[: len(texts)], pa.string())})
    plain = {"normalisation": "plain", "digits": "keep", "words": 2, "characters": 2, "language_column": "lang"}
    for signature in ("fast", "datasketch"):
        wanted = {**plain, "permutations": 16, "threshold": 0.5, "signature": signature}
        kernel, reference = (DedupOptions.model_validate({**wanted, "backend": name}) for name in ("kernel", "datasketch"))
        ours, theirs = document_signatures(batch, kernel), document_signatures(batch, reference)
        assert (ours.values == theirs.values).all()
        assert (ours.signed == theirs.signed).all()
    offsets = document_shingles(batch, DedupOptions.model_validate(plain))[1]
    units = resolve_units(batch["text"], batch["lang"], AUTO).tolist()
    assert [int(n) for n in offsets[1:] - offsets[:-1]] == [len(set(naive(t, u, 2))) for t, u in zip(texts, units, strict=True)]


@pytest.mark.parametrize(("text", "unit"), [("你好 world 世界", CHARACTERS), ("hello wide 世 world", WORDS), ("", WORDS)])
def test_scripts_decide_the_unit_where_no_language_does(text: str, unit: int) -> None:
    assert resolve_units(pa.array([text]), None, AUTO).tolist() == [unit]
