"""The order of training samples: every row once an epoch, exact shares, any position at any time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.mixture import Mixture, permuted, weights_by_tokens

sizes_and_weights = st.lists(st.tuples(st.integers(1, 700), st.floats(0.001, 10)), min_size=1, max_size=4)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63))
def test_a_permutation_is_one(size: int, key: int) -> None:
    images = permuted(np.arange(size), size, np.uint64(key))
    assert sorted(images.tolist()) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(sizes_and_weights, st.integers(0, 2**32), st.integers(0, 10**12), st.data())
def test_a_sample_depends_on_its_position_alone(
    inputs: list[tuple[int, float]], seed: int, start: int, data: st.DataObject
) -> None:
    mixture = Mixture([size for size, _ in inputs], [weight for _, weight in inputs], seed)
    together = mixture.locate(np.arange(start, start + 600))
    where = data.draw(st.lists(st.integers(0, 599), min_size=1, max_size=20))
    alone = Mixture([size for size, _ in inputs], [weight for _, weight in inputs], seed).locate(np.array(where) + start)
    for name in ("source", "row", "epoch"):
        assert (getattr(alone, name) == getattr(together, name)[where]).all()
    assert (together.row < np.array([size for size, _ in inputs])[together.source]).all()


@settings(max_examples=40, deadline=None)
@given(sizes_and_weights, st.integers(0, 2**32))
def test_every_row_comes_once_an_epoch_and_epochs_follow_each_other(inputs: list[tuple[int, float]], seed: int) -> None:
    mixture = Mixture([size for size, _ in inputs], [weight for _, weight in inputs], seed)
    draw = mixture.locate(np.arange(4096))
    for index, (size, _) in enumerate(inputs):
        mine = draw.source == index
        assert (draw.epoch[mine] == np.arange(mine.sum()) // size).all()
        for epoch in range(int(mine.sum()) // size):
            rows = draw.row[mine & (draw.epoch == epoch)]
            assert sorted(rows.tolist()) == list(range(size))


@given(sizes_and_weights, st.integers(0, 2**32), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_shares_are_exact_to_a_sample_after_whole_blocks(inputs: list[tuple[int, float]], seed: int, blocks: int) -> None:
    weights = np.array([weight for _, weight in inputs])
    draw = Mixture([size for size, _ in inputs], weights.tolist(), seed).locate(np.arange(blocks * 256))
    counts = np.bincount(draw.source, minlength=len(inputs))
    assert (np.abs(counts - blocks * 256 * weights / weights.sum()) <= len(inputs)).all()


def test_a_five_percent_share_stays_within_a_thousandth_at_every_point_of_ten_million_tokens() -> None:
    length = 512
    draw = Mixture([5000, 300], [0.95, 0.05], 7).locate(np.arange(10_000_000 // length))
    shares = np.cumsum(draw.source == 1) / np.arange(1, len(draw.source) + 1)
    assert abs(shares[-1] - 0.05) < 0.001
    assert np.abs(shares[4000:] - 0.05).max() < 0.001


def test_another_seed_is_another_order() -> None:
    first, second = (Mixture([1000], [1], seed).locate(np.arange(1000)).row for seed in (1, 2))
    assert (first != second).mean() > 0.9
    again = Mixture([1000], [1], 1).locate(np.arange(1000, 2000)).row
    assert (first != again).mean() > 0.9


def test_weights_of_tokens_become_weights_of_rows() -> None:
    rows = weights_by_tokens([0.5, 0.5], [100, 400])
    assert rows[0] / rows[1] == pytest.approx(4)


@pytest.mark.parametrize(("sizes", "weights", "text"), [([0, 3], [1, 1], "'a' has no rows"), ([1, 3], [1, 0], "'b' has weight 0")])
def test_an_empty_input_or_a_weight_of_nothing_is_refused_by_name(sizes: list[int], weights: list[float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Mixture(sizes, weights, 0, ["a", "b"])
