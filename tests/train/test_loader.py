"""Batches from the memory-mapped twin of a pack stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.train.conftest import documents, finish
from train.loader import IGNORE, PackedTokens, TokenLoader, micro_batches, rank_positions


def slow_row(corpus: PackedTokens, sequence: int) -> tuple[list[int], list[int]]:
    """Positions and labels of one row, by the definition."""
    tokens, bounds = corpus.row(sequence).tolist(), corpus.boundaries(sequence).tolist()
    positions, labels = [], []
    for t in range(corpus.length):
        start = max([b for b in bounds if b <= t])
        positions.append(t - start)
        inside = t + 1 < bounds[-1] and t + 1 not in bounds
        labels.append(int(tokens[t + 1]) if inside else IGNORE)
    return positions, labels


def test_positions_and_labels_respect_documents_and_padding(packed: str) -> None:
    corpus = PackedTokens(packed)
    loader = TokenLoader([corpus], [1.0], 3, ["tokens"])
    positions = np.arange(2 * len(corpus))
    batch, draw = loader.batch(positions), loader.locate(positions)
    for place, sequence in enumerate(draw.row):
        expected_positions, expected_labels = slow_row(corpus, sequence)
        assert batch.position_ids[place].tolist() == expected_positions
        assert batch.labels[place].tolist() == expected_labels
        assert batch.input_ids[place].tolist() == corpus.row(sequence).tolist()
    assert batch.valid_tokens == (batch.labels != IGNORE).sum() == loader.valid_tokens(positions).sum()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_sequence_of_samples_is_the_same_on_any_number_of_workers(packed: str, world: int) -> None:
    loader = TokenLoader([PackedTokens(packed)], [1.0], 0, ["tokens"])
    whole = loader.locate(np.arange(10 * 8)).row
    pieces = [loader.locate(rank_positions(step, 8, rank, world)).row for step in range(10) for rank in range(world)]
    assert np.concatenate(pieces).tolist() == whole.tolist()


def test_a_run_resumed_at_any_step_on_1_2_or_4_workers_reads_what_the_undisturbed_one_reads(packed: str) -> None:
    corpora = [PackedTokens(packed), PackedTokens(packed)]

    def loader() -> TokenLoader:
        return TokenLoader(corpora, [0.9, 0.1], 5, ["tokens", "again"])

    steps, size = range(505, 523), 8  # across a stretch of remembered places
    whole = loader().mixture.locate(np.arange(steps.start * size, steps.stop * size))
    expected = list(zip(whole.source.tolist(), whole.row.tolist(), strict=True))
    for killed, world in ((507, 1), (511, 2), (518, 4)):
        undisturbed, found = loader(), []
        for step in range(steps.start, killed):
            draw = undisturbed.locate(rank_positions(step, size, 0, 1))
            found += list(zip(draw.source.tolist(), draw.row.tolist(), strict=True))
        state = undisturbed.state(killed * size, 0)
        ranks = [loader() for _ in range(world)]
        for step in range(ranks[0].resume(state) // size, steps.stop):
            for rank, resumed in enumerate(ranks):
                draw = resumed.locate(rank_positions(step, size, rank, world))
                found += list(zip(draw.source.tolist(), draw.row.tolist(), strict=True))
        assert found == expected


def test_five_percent_of_the_tokens_are_five_percent_within_a_thousandth_over_ten_million(
    tmp_path: Path, make_pack: Callable[..., str]
) -> None:
    directories = []
    for number, (rows, tokens) in enumerate(((9000, (900, 1024)), (700, (40, 1024)))):
        directory = tmp_path / str(number) / "f"
        directory.mkdir(parents=True)
        draw = np.random.default_rng(number)
        bounds = np.stack([np.zeros(rows, int), draw.integers(*tokens, rows, endpoint=True)], 1)
        bounds.astype("<i4").tofile(directory / "boundaries.bin")
        np.arange(0, 2 * rows + 1, 2).astype("<i8").tofile(directory / "boundary_offsets.bin")
        with open(directory / "tokens.bin", "wb") as stream:
            stream.truncate(rows * 1024 * 2)
        index = {"dtype": "uint16", "length": 1024, "sequences": rows, "vocab_size": 500, "eos_token_id": 0}
        names = {"boundaries": "boundaries.bin", "boundary_offsets": "boundary_offsets.bin"}
        (directory / "tokens.json").write_text(json.dumps({**index, **names}))
        directories.append(finish(directory, "pack", {"tokens": "tokens.bin", "index": "tokens.json"}))
    loader = TokenLoader([PackedTokens(directory) for directory in directories], [0.95, 0.05], 3, ["general", "domain"])
    positions = np.arange(11_000)
    tokens, source = loader.valid_tokens(positions), loader.locate(positions).source
    share = np.cumsum(tokens * (source == 1)) / np.cumsum(tokens)
    assert np.cumsum(tokens)[-1] > 9_900_000
    assert abs(share[-1] - 0.05) < 0.001


def test_a_batch_that_does_not_divide_among_workers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 does not divide among 3 workers; use one of \[1, 2, 4, 8\]"):
        rank_positions(0, 8, 0, 3)


def test_corpora_are_mixed_by_tokens_although_their_rows_hold_different_numbers(
    tmp_path: Path, make_pack: Callable[..., str]
) -> None:
    full = PackedTokens(make_pack(tmp_path / "full" / "f", documents(300), 64))
    # One short document a row, the rest padding: few tokens a row.
    thin_rows = [row for row in documents(60, seed=5) if len(row["text"]) < 150]
    thin_directory = tmp_path / "thin" / "f"
    thin = make_pack(thin_directory, thin_rows, 64)
    index = json.loads((thin_directory / "tokens.json").read_text())
    bounds = np.tile(np.array([0, 9], "<i4"), index["sequences"])
    bounds.tofile(thin_directory / "boundaries.bin")
    np.arange(0, len(bounds) + 1, 2).astype("<i8").tofile(thin_directory / "boundary_offsets.bin")
    corpora = [full, PackedTokens(thin)]
    assert corpora[1].mean_valid_tokens() == 8
    loader = TokenLoader(corpora, [0.8, 0.2], 1, ["full", "thin"])
    positions = np.arange(20_000)
    tokens, source = loader.valid_tokens(positions), loader.locate(positions).source
    assert tokens[source == 1].sum() / tokens.sum() == pytest.approx(0.2, abs=0.001)


def test_a_state_of_other_data_is_refused(packed: str) -> None:
    loader = TokenLoader([PackedTokens(packed)], [1.0], 0, ["tokens"])
    state = loader.state(80, 1234)
    assert loader.resume(state) == 80
    with pytest.raises(ValueError, match="read other data"):
        TokenLoader([PackedTokens(packed)], [1.0], 1, ["tokens"]).resume(state)


def test_a_truncated_twin_is_refused(tmp_path: Path, make_pack: Callable[..., str]) -> None:
    directory = tmp_path / "cut" / "f"
    path = make_pack(directory, documents(20), 32)
    data = (directory / "tokens.bin").read_bytes()
    (directory / "tokens.bin").write_bytes(data[:-2])
    with pytest.raises(ValueError, match=r"tokens\.bin: .* bytes, the index says"):
        PackedTokens(path)


def test_micro_batches_cover_the_rows_in_order() -> None:
    assert [(s.start, s.stop) for s in micro_batches(7, 3)] == [(0, 2), (2, 4), (4, 7)]
    assert micro_batches(4, None) == [slice(0, 4)]
