from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from operators.tokens import bpe
from operators.tokens.encode import Encoder, TokenizerFiles, cut
from pipelines.stages.tokens import TokenizerStage
from tests.operators.tokens.build import bilingual, context, corpus


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bpe.train(iter([[row["text"] for row in bilingual(200)]]), 500)


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer.to_str().encode())


def test_special_tokens_have_the_first_ids_and_every_byte_a_token(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in bpe.SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() <= 500
    assert len(bpe.train(iter([[]]), bpe.LEAST_VOCABULARY).get_vocab()) == bpe.LEAST_VOCABULARY
    with pytest.raises(ValueError, match="at least 260"):
        bpe.train(iter([[]]), 100)


@given(st.lists(st.text(), max_size=5))
@settings(deadline=None, max_examples=300)
def test_any_text_round_trips(encoder: Encoder, texts: list[str]) -> None:
    tokens, offsets = encoder.encode(pa.array(texts, pa.large_string()))
    assert [encoder.decode(tokens[a:b]) for a, b in pairwise(offsets)] == texts


@pytest.mark.parametrize(
    "text",
    [
        "\x00a\x00\x00",
        "👨‍👩‍👧 😀",
        "丹炉，把　矿石\r\n\r\n炼成",
        "हिन्दी ไทย עברית",
        "<|endoftext|><|im_start|>system",
        " \t \n  x",
        "\ufeff\u200b",
    ],
)
def test_awkward_text_round_trips(encoder: Encoder, text: str) -> None:
    tokens, _ = encoder.encode(pa.array([text]))
    assert encoder.decode(tokens) == text


def test_text_that_spells_a_special_token_is_ordinary_text(encoder: Encoder) -> None:
    tokens, _ = encoder.encode(pa.array(["a<|endoftext|>b<|im_end|>", None, ""]))
    assert tokens.min() > 3


def test_scripts_and_full_width_punctuation_are_kept_apart() -> None:
    split = bpe.untrained().pre_tokenizer.pre_tokenize_str
    text = "使用Python语言，我们说：“don't”。 1234567\n\n  def f(x):"
    pieces = [text[a:b] for _, (a, b) in split(text)]
    assert pieces[:6] == ["使用", "Python", "语言", "，", "我们说", "：“"]
    assert pieces[6:] == ["don", "'t", "”。", " ", "123", "456", "7", "\n\n", " ", " def", " f", "(x", "):"]


@given(
    st.lists(st.sampled_from(["word", " ", "字", "，", "。", "\n", "x1", "'s", "ß", "é́", "  ", "9", "#"]), max_size=400),
    st.integers(8, 60),
)
@settings(deadline=None, max_examples=150)
def test_cutting_a_long_text_leaves_its_tokens_as_they_are(tokenizer: Tokenizer, words: list[str], size: int) -> None:
    text = "".join(words)
    pieces = cut(text, size)
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    if all(piece[-1:].isalpha() and not after[:1].isalpha() for piece, after in pairwise(pieces)):
        encode = tokenizer.encode
        assert [token for piece in pieces for token in encode(piece).ids] == encode(text).ids


def test_a_long_line_is_cut_at_seams_and_a_blob_by_force(encoder: Encoder, tokenizer: Tokenizer) -> None:
    prose = "丹炉把矿石炼成金属，the smith makes a blade. " * 9000
    tokens, offsets = encoder.encode(pa.array([prose, "x"]))
    assert tokens[: offsets[1]].tolist() == tokenizer.encode(prose).ids
    blob = "QUJD" * 50_000
    tokens, _ = encoder.encode(pa.array([blob]))
    assert encoder.decode(tokens) == blob


def test_training_depends_on_neither_order_nor_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [row["text"] for row in bilingual(300)]
    models = set()
    for threads, seed in (("false", 1), ("true", 2), ("true", 3)):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)
        random.Random(seed).shuffle(texts)
        models.add(bpe.train(iter([texts[:100], texts[100:]]), 600).to_str())
    assert len(models) == 1


def test_no_token_is_longer_than_asked() -> None:
    trained = bpe.train(iter([["这是一句反复出现的很长很长的页脚文字。" * 50]]), 400, max_token_bytes=9)
    assert max(len(token) for token in trained.get_vocab() if token not in bpe.SPECIAL_TOKENS) <= 9


@pytest.mark.usefixtures("ray_cluster")
def test_the_stage_gives_the_same_bytes_for_any_parts_and_workers(tmp_path: Path) -> None:
    rows = bilingual(300)
    made = []
    for name, part_rows, workers in (("a", [300], 1), ("b", [7, 80, 33], 2)):
        source = corpus(tmp_path / name, "docs", rows, part_rows)
        ctx = context(tmp_path / name, "bpe", {"docs": source}, workers=workers)
        TokenizerStage(input="docs", vocab_size=600, sample_bytes=60_000).run(ctx)
        made.append(
            (Path(ctx.directory, "tokenizer.json").read_bytes(), json.loads(Path(ctx.directory, "manifest.json").read_bytes()))
        )
    assert made[0][0] == made[1][0]
    stats = made[0][1]["stats"]
    assert stats == made[1][1]["stats"]
    assert stats["documents"] < 300 == stats["corpus_documents"]
    assert 50_000 < stats["bytes"] <= 60_000
    assert set(stats["tokens_per_character"]) == {"en", "zh"}
    assert not Path(tmp_path / "a" / "bpe" / "f1" / ".scratch").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_transformers_opens_the_tokenizer_and_masks_assistant_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = corpus(tmp_path, "docs", bilingual(50), [50])
    ctx = context(tmp_path, "bpe", {"docs": source})
    TokenizerStage(input=["docs"], vocab_size=400).run(ctx)
    opened = AutoTokenizer.from_pretrained(ctx.directory)
    assert (opened.eos_token_id, opened.pad_token_id) == (0, 1)
    assert opened.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [2, 3]
    text = "丹炉 turns\x00 ore 😀 ."
    assert opened.decode(opened(text)["input_ids"]) == text
    expected, _ = Encoder(Path(ctx.directory, "tokenizer.json").read_bytes()).encode(pa.array([text]))
    assert opened(text)["input_ids"] == expected.tolist()
    messages = [
        {"role": "user", "content": "你好 hi"},
        {"role": "assistant", "content": "丹炉。"},
        {"role": "user", "content": "ok"},
    ]
    rendered = opened.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = np.array(rendered["input_ids"])[np.array(rendered["assistant_masks"], bool)]
    assert opened.decode(marked) == "丹炉。<|im_end|>"
    whole = opened.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert whole == "<|im_start|>user\n你好 hi<|im_end|>\n<|im_start|>assistant\n"


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        TokenizerFiles.load(str(tmp_path / "none"))
