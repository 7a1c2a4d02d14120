"""Chunks: exact offsets whatever the text, bounded length, nothing lost, cuts where the structure has them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.config import SettingsError
from operators.synthesis.documents.chunks import Chunk, ChunkSettings, chunk
from operators.synthesis.documents.quotas import spread
from operators.synthesis.documents.token_counts import counts_of, estimate
from tests.operators.synthesis.documents.said import EN, ZH

SMALL = ChunkSettings(max_tokens=40, overlap_tokens=10, min_tokens=1)
PIECES = [
    "# Title\n", "Heading\n=======\n", "~~~\nOver\n~~~\n", "```python\n", "```\n", "- item one\n", "1. first\n", "\n\n", "\r\n",
    "  indented\n", "A sentence, e.g. this one. ", "Another? Yes! ", "这是一句话。", "另一句！还有？", "第一章 总则\n",
    "\u0301\u200d🧑🏽‍🚀", "\x00", "x" * 90, "字" * 60, "| a | b |\n", "...", "…" * 5, "\u2028", "a b " * 20, ":\n", "﷽", "\t",
]  # fmt: skip
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.text(max_size=400))


def cut(text: str, values: ChunkSettings = SMALL) -> list[Chunk]:
    return chunk(text, estimate(text), values)[0]


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_chunks_are_stretches_of_the_text_that_leave_nothing_out(text: str) -> None:
    counts = estimate(text)
    found, short = chunk(text, counts, SMALL)
    covered = np.zeros(len(text), bool)
    for item in found:
        assert 0 <= item.start < item.end <= len(text)
        assert text[item.start : item.end] == text[item.start : item.end].strip() != ""
        assert item.tokens == counts[item.end] - counts[item.start]
        assert item.tokens <= SMALL.max_tokens or item.end - item.start == 1
        covered[item.start : item.end] = True
    for before, after in itertools.pairwise(found):
        assert before.start < after.start and before.end < after.end
        assert counts[before.end] - counts[min(after.start, before.end)] <= SMALL.overlap_tokens
    if not short:
        assert all(covered[place] or text[place].isspace() for place in range(len(text)))


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_short_chunks_are_counted_and_left_out(text: str) -> None:
    values = ChunkSettings(max_tokens=40, overlap_tokens=0, min_tokens=12)
    found, short = chunk(text, estimate(text), values)
    assert all(item.tokens >= 12 for item in found)
    assert found or short or not text.strip()


def test_sections_begin_chunks_and_their_titles_go_along() -> None:
    found = cut(EN, ChunkSettings(max_tokens=90, overlap_tokens=10, min_tokens=4))
    texts = [EN[item.start : item.end] for item in found]
    assert any(text.startswith("## Feeding") for text in texts)
    assert all(not text.rstrip().endswith(("## Feeding", "## Swarming")) for text in texts)
    assert found[-1].headings[0] == "Beekeeping"
    chinese = cut(ZH, ChunkSettings(max_tokens=90, overlap_tokens=10, min_tokens=4))
    assert any(ZH[item.start : item.end].startswith("## 饲喂") for item in chinese)


def test_rest_and_chinese_chapters_are_headings() -> None:
    body = "Words of some length stand here. " * 6
    text = f"=====\nGuide\n=====\n\n{body}\n\nFirst part\n----------\n\n{body}\n\n第二章 管理\n{'这里有一些文字。' * 10}\n"
    text += f"第二节 细则\n{'更多的文字在这里。' * 10}"
    found = cut(text, ChunkSettings(max_tokens=100, overlap_tokens=0, min_tokens=4))
    assert [item.headings for item in found if text[item.start :].startswith("First part")] == [("Guide",)]
    assert any(text[item.start :].startswith("第二章") for item in found)
    assert any(item.headings == ("第二章 管理",) and text[item.start :].startswith("第二节") for item in found)


def test_code_stays_whole_where_it_fits_and_is_cut_at_line_ends_where_it_does_not() -> None:
    code = "```\n" + "".join(f"line {n} of code\n" for n in range(6)) + "```\n"
    text = "Before it stands a paragraph of words. " * 3 + "\n\n" + code + "\nAfter it come more words. " * 3
    assert any(
        code.strip() in text[item.start : item.end]
        for item in cut(text, ChunkSettings(max_tokens=60, overlap_tokens=8, min_tokens=2))
    )
    long = "```\n" + "".join(f"line {n} of code\n" for n in range(60)) + "```\n"
    for item in cut(long):
        assert item.end == len(long.rstrip()) or long[item.end] == "\n"


def test_paragraphs_are_cut_between_sentences_of_both_languages() -> None:
    for sentence in ("Dr. Bee keeps, e.g. in May, nine hives near St. Albans. ", "王先生在五月养了九箱蜜蜂（都在山上）。"):
        text = sentence * 30
        for item in cut(text, ChunkSettings(max_tokens=80, overlap_tokens=24, min_tokens=2)):
            assert text[item.start : item.end].endswith(sentence.strip()[-1])
            assert text[item.start :].startswith(sentence[:3])


def test_a_megabyte_of_anything_is_cut_in_linear_time() -> None:
    texts = [EN * 1800, "." * 1_000_000, "字" * 1_000_000]
    texts += [line * (60_000 // len(line)) for line in ("# \n", "- a\n", "```\n", "x y. ", "-", "#", "!!!!\n", "a:\n\n")]
    for text in texts:
        found, _ = chunk(text, estimate(text), ChunkSettings())
        assert found[-1].end > len(text) - 2200
        assert max(item.tokens for item in found) <= 512


def test_an_overlap_of_more_than_half_is_refused() -> None:
    with pytest.raises(ValueError, match="half"):
        ChunkSettings(max_tokens=64, overlap_tokens=40)


def test_a_tokenizer_counts_every_token_once(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([EN, ZH], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    counts = counts_of(str(tmp_path / "tokenizer.json"))
    for text in (EN, ZH, EN * 300, "🧑🏽‍🚀\x00\u0301", ""):
        found = counts(text)
        assert len(found) == len(text) + 1 and found[0] == 0 and (np.diff(found) >= 0).all()
        whole = len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert abs(int(found[-1]) - whole) <= len(text) // 60_000 + 1
        for item in chunk(text, found, ChunkSettings(max_tokens=120, overlap_tokens=20, min_tokens=1))[0]:
            assert len(tokenizer.encode(text[item.start : item.end], add_special_tokens=False).ids) <= 124
    with pytest.raises(SettingsError, match=r"no tokenizer at .*missing"):
        counts_of(str(tmp_path / "missing.json"))


@given(st.integers(0, 200), st.integers(1, 20), st.integers(0, 5))
def test_the_draw_takes_one_of_each_stretch(total: int, count: int, seed: int) -> None:
    found = spread(list(range(total)), count, seed, "d")
    assert found == spread(list(range(total)), count, seed, "d") == sorted(set(found))
    assert len(found) == min(total, count)
    if total > count:
        assert all(place * total // count <= item < (place + 1) * total // count for place, item in enumerate(found))
