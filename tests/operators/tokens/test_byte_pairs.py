"""The compiled encoder against the tokenizers library: the same ids for any text, under every rule it knows."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.tokens import bpe, byte_pairs, splitting
from operators.tokens.encode import Encoder
from tests.operators.tokens.build import bilingual

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_QWEN, _LLAMA = (pattern for pattern in splitting._patterns() if pattern != bpe.PATTERN)


@cache
def _trained() -> str:
    return bpe.train(iter([[row["text"] for row in bilingual(200)]]), 600).to_str()


def model(kind: str, **changes: Any) -> bytes:
    """A trained tokenizer under another pre-tokenizer."""
    found = json.loads(_trained())
    if kind == "gpt2":
        found["pre_tokenizer"] = GPT2
    elif kind != "ours":
        found["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = _QWEN if kind == "qwen" else _LLAMA
    if kind == "qwen":
        found["normalizer"] = {"type": "NFC"}
    found["model"].update(changes)
    return json.dumps(found).encode()


@cache
def pair(kind: str) -> tuple[Encoder, Encoder]:
    compiled, library = Encoder(model(kind)), Encoder(model(kind), kernel=False)
    assert compiled.kernel is not None and library.kernel is None
    return compiled, library


def check(kind: str, texts: list[str | None]) -> None:
    compiled, library = pair(kind)
    column = pa.array(texts, pa.large_string())
    mine, theirs = compiled.encode(column), library.encode(column)
    for number, text in enumerate(texts):
        a, b = (ids[offsets[number] : offsets[number + 1]].tolist() for ids, offsets in (mine, theirs))
        assert a == b, f"{kind}: {text!r}"


KINDS = ["ours", "gpt2", "qwen", "llama3"]
pieces = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "'s",
            "'S",
            "'ſ",
            "'ll",
            "'LL",
            "'re",
            "'",
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "\u3000",
            "\xa0",
            "１",
            "123",
            "Ⅷ",
            "〇",
            "é",
            "é",
            "丹炉",
            "，我",
            "です。",
            "の",
            "한국",
            "ก็",
            "हिन्दी",
            "۳",
            "!?",
            " !",
            "\u200b",
            "😀",
            "👨\u200d👩",
            "ﬆ",
            "ﬃ",
            "K",
            "々",
            "゙",
            "⺀",
        ]
    ),
)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(st.lists(pieces, max_size=12).map("".join), max_size=6))
@settings(deadline=None, max_examples=25)
def test_any_text_has_the_ids_of_the_library(kind: str, texts: list[str]) -> None:
    check(kind, [*texts])


@pytest.mark.parametrize("kind", KINDS)
def test_long_words_empty_texts_and_nulls_have_the_ids_of_the_library(kind: str) -> None:
    check(kind, [None, "", "a" * 5000, "矿石炼成金属" * 400, "ab" * 30 + "温度" * 40, "\n" * 300, " " * 77 + "x", "0123456789" * 9])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [2999, pytest.param(1, marks=pytest.mark.slow)])
def test_every_code_point_beside_every_class_has_the_ids_of_the_library(kind: str, every: int) -> None:
    codes = np.concatenate([np.arange(0xD800), np.arange(0xE000, 0x110000)])[::every]
    contexts = ("a{0}b", "'{0}", " {0}", "1{0}2", "，{0}字", "\n{0}\n", "{0}{0} ", "\u0301{0}")
    for group in np.array_split(codes, max(1, len(codes) // 20_000)):
        check(kind, [context.format(chr(code)) for code in group.tolist() for context in contexts])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_classes_of_all_code_points_are_those_of_the_library(kind: str) -> None:
    rules = splitting.rules_of(json.loads(model(kind))["pre_tokenizer"])
    assert rules is not None
    table = splitting.classes(rules)
    for bit, pattern in splitting.questions(rules):
        held = np.zeros(0x110000, bool)
        held[splitting._members(pattern)] = True
        if rules.prefix is None and bit == splitting.PREFIX:
            held[ord(" ")] = True
        assert np.array_equal((table & bit) != 0, held), pattern


def test_the_classes_are_asked_of_the_library_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    answers = {r"\p{L}": [97, 0x4E2D], r"\p{N}": [49], r"\s": [32]}

    def members(pattern: str) -> np.ndarray:
        asked.append(pattern)
        return np.array(answers.get(pattern, []), np.int64)

    monkeypatch.setenv("DANLU_CACHE", str(tmp_path))
    monkeypatch.setattr(splitting, "_members", members)
    monkeypatch.setattr(splitting, "classes", splitting.classes.__wrapped__)
    first = splitting.classes(splitting.GPT2)
    questions = len(asked)
    assert questions == len(splitting.questions(splitting.GPT2)) and first[32] == splitting.SPACE | splitting.PREFIX
    assert np.array_equal(splitting.classes(splitting.GPT2), first) and len(asked) == questions
    (file,) = (tmp_path / "characters").iterdir()
    for harm in (file.read_bytes()[:-9], b"", file.read_bytes()[1:]):
        file.write_bytes(harm)
        assert np.array_equal(splitting.classes(splitting.GPT2), first), "a file that is not whole is not believed"
    assert len(asked) == 4 * questions
    monkeypatch.setattr(splitting.tokenizers, "__version__", "0.0")
    splitting.classes(splitting.GPT2)
    assert len(asked) == 5 * questions, "another version of the library has other tables"


@pytest.mark.parametrize("kind", KINDS)
def test_emptying_the_table_of_words_changes_no_id(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_pairs, "_SLOTS", 64)
    compiled = Encoder(model(kind))
    texts = pa.array([row["text"] for row in bilingual(120)] + [f"w{n} 字{n}" for n in range(500)], pa.large_string())
    assert compiled.encode(texts)[0].tolist() == pair(kind)[1].encode(texts)[0].tolist()


def test_the_bytes_stand_for_the_characters_of_the_library() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(byte_pairs.byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    shown = byte_pairs.byte_characters()
    for text in ["".join(map(chr, range(128))), "丹炉é😀ÿ\u07ff"]:
        assert split.pre_tokenize_str(text)[0][0] == "".join(shown[byte] for byte in text.encode())


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"unk_token": "<|pad|>"}, {"byte_fallback": True}, {"ignore_merges": True}])
def test_a_tokenizer_with_rules_that_are_not_known_goes_through_the_library(changes: dict[str, Any]) -> None:
    assert byte_pairs.compiled(json.loads(model("ours", **changes))) is None
    assert byte_pairs.compiled({**json.loads(model("ours")), "normalizer": {"type": "Lowercase"}}) is None
    assert byte_pairs.compiled({**json.loads(model("ours")), "pre_tokenizer": {"type": "Whitespace"}}) is None


def test_texts_with_added_tokens_that_are_not_special_go_through_the_library() -> None:
    found = json.loads(model("ours"))
    size = pair("ours")[1].vocab_size
    added = {**found["added_tokens"][0], "id": size, "content": "<tool.call>", "special": False}
    data = json.dumps({**found, "added_tokens": [*found["added_tokens"], added]}).encode()
    texts = pa.array(["前 <tool.call> 后", "<toolxcall>", "plain text", "<tool.call>"], pa.large_string())
    compiled, library = Encoder(data), Encoder(data, kernel=False)
    ids, offsets = compiled.encode(texts)
    assert size in ids[: offsets[1]] and size not in ids[offsets[1] : offsets[3]]
    for mine, theirs in zip((ids, offsets), library.encode(texts), strict=True):
        assert mine.tolist() == theirs.tolist()


@pytest.mark.parametrize("rows", [6, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["en", "zh", "other"])
def test_real_text_has_the_ids_of_the_library(name: str, rows: int, data_pack: Path) -> None:
    text = pq.read_table(data_pack / "corpus" / f"{name}.parquet", columns=["text"])["text"]
    for kind in KINDS:
        compiled, library = pair(kind)
        some = text.slice(40, rows)
        for mine, theirs in zip(compiled.encode(some), library.encode(some), strict=True):
            assert np.array_equal(mine, theirs), kind
