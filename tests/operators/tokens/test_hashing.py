from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.tokens.hashing import hash_strings
from operators.tokens.holdout import is_held_out
from operators.tokens.sample import BINS, hash_bins, limit_for

LONG = st.text(max_size=40) | st.text(min_size=40, max_size=300)


@given(st.lists(LONG, max_size=20), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_the_hash_is_xxh64_of_the_utf8_bytes(texts: list[str], seed: int) -> None:
    expected = [xxhash.xxh64_intdigest(text.encode(), seed) for text in texts]
    assert hash_strings(pa.array(texts, pa.string()), seed).tolist() == expected
    assert hash_strings(pa.array(["x", *texts], pa.large_string())[1:], seed).tolist() == expected


def test_held_out_documents_do_not_depend_on_batches_or_order_and_grow_with_the_share() -> None:
    ids = [f"文档-{number}" for number in range(20_000)]
    whole = is_held_out(ids, 17, 0.05)
    assert 850 < whole.sum() < 1150
    assert np.array_equal(whole[::-1], is_held_out(ids[::-1], 17, 0.05))
    assert np.array_equal(whole, np.concatenate([is_held_out(pa.array(ids[i : i + 777]), 17, 0.05) for i in range(0, 20_000, 777)]))
    assert (is_held_out(ids, 17, 0.2) >= whole).all()
    assert not np.array_equal(whole, is_held_out(ids, 18, 0.05))
    assert not is_held_out(ids, 17, 0.0).any()
    assert is_held_out(ids, 17, 1.0).all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        is_held_out(ids, 17, 5.0)


def test_the_tokenizer_sample_is_drawn_apart_from_the_held_out_documents() -> None:
    ids = [f"d{number}" for number in range(20_000)]
    bins = hash_bins(pa.array(ids), 17)
    sampled = bins < np.sort(bins)[2000]
    both = (sampled & is_held_out(ids, 17, 0.1)).sum()
    assert 120 < both < 280


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50), st.integers(1, 5000))
@settings(deadline=None)
def test_the_limit_takes_as_much_as_fits_but_at_least_one_document(sizes: list[int], wanted: int) -> None:
    histogram = np.zeros(BINS, np.int64)
    histogram[: len(sizes)] = sizes
    limit = limit_for(histogram, wanted)
    taken = histogram[:limit].sum()
    first = int(np.flatnonzero(histogram)[0]) if histogram.any() else 0
    assert taken <= wanted or limit == first + 1
    assert limit == BINS or taken + histogram[limit] > wanted
