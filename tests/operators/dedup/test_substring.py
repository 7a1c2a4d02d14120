"""Substring dedup: the spans that go are those of a suffix array built in plain Python."""

from __future__ import annotations

import itertools
import re
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.dedup import lines, substring
from operators.dedup.normalise import UNSPACED, code_table
from operators.dedup.substring import SubstringOptions, phases_of, stats_of
from operators.dedup.windows import tokens_of
from pipelines.stages.cutting import SubstringDedupStage
from tests.operators.dedup.corpus import context_of, directory_of, run_here, write_corpus
from tests.operators.dedup.cut import cut_spans, documents, run_cut, same_bytes, view_without

STANDING = "the quick brown fox jumps over the lazy dog and then sleeps"
STEHEND = "天地玄黄宇宙洪荒日月盈昃辰宿列张"


def plain_tokens(text: str) -> list[tuple[int, int]]:
    """(start, end) of the tokens in bytes, by Python's own tables: see operators/dedup/windows.py."""
    kinds = []
    for character in text:
        category = unicodedata.category(character)
        if character.isspace() or character == "\u200b":
            kinds.append("white")
        elif code_table()[ord(character)] & UNSPACED:
            kinds.append("alone")
        elif category[0] in "PSZ" or category == "Cc":
            kinds.append(character)
        else:
            kinds.append("word")
    found, position = [], 0
    for i, (character, kind) in enumerate(zip(text, kinds, strict=True)):
        size = len(character.encode())
        if kind != "white":
            if kind == "alone" or i == 0 or kinds[i - 1] != kind:
                found.append((position, position + size))
            else:
                found[-1] = (found[-1][0], position + size)
        position += size
    return found


def reference(rows: list[str], n: int) -> list[list[bool]]:
    """For each token whether it goes: suffixes of all texts sorted, runs with n tokens in common, all but the first place."""
    tokens = [[row.encode()[a:b] for a, b in plain_tokens(row)] for row in rows]
    suffixes = sorted((tokens[d][s : s + n], d, s) for d in range(len(rows)) for s in range(len(tokens[d]) - n + 1))
    goes = [[False] * len(own) for own in tokens]
    for (before, *_), (window, d, s) in itertools.pairwise(suffixes):
        if window == before:
            goes[d][s : s + n] = [True] * n
    return goes


def expected_texts(rows: list[str], n: int) -> list[str | None]:
    """What is left, None where nothing is: the white space after a span goes too if there is some (or nothing) before it."""
    left: list[str | None] = []
    for row, goes in zip(rows, reference(rows, n), strict=True):
        raw, places = row.encode(), plain_tokens(row)
        out, position, token = b"", 0, 0
        while token < len(places):
            if not goes[token]:
                token += 1
                continue
            last = token
            while last < len(places) and goes[last]:
                last += 1
            before = places[token - 1][1] if token else 0
            out += raw[position : places[token][0]]
            position = places[last - 1][1]
            if before < places[token][0] or token == 0:
                position = places[last][0] if last < len(places) else len(raw)
            token = last
        text = (out + raw[position:]).decode()
        left.append(None if any(goes) and not text else text)
    return left


def test_a_span_stays_where_it_stands_first_and_goes_everywhere_else(tmp_path: Path) -> None:
    rows = [
        f"One. {STANDING}. End",
        f"Two:\n{STANDING.replace(' ', chr(10))}! {STEHEND}。",
        f"甲{STEHEND}乙",
        f"{STANDING} {STEHEND}",
        "nothing here is said twice",
    ]
    texts, manifest = run_cut(tmp_path, "clean", documents(rows), phases_of, SubstringOptions(tokens=10, partitions=3), part_rows=2)
    assert texts == ["d0:" + rows[0], f"d1:Two:\n! {STEHEND}。", "d2:甲乙", "d4:" + rows[4]]
    assert manifest.ledger.rejected == {"line_dedup:too_little_left": 1}
    spans = cut_spans(str(directory_of(tmp_path, "clean")))
    assert [(span["id"], span["kept_id"], span["text"].strip()) for span in spans] == [
        ("d1", "d0", STANDING.replace(" ", "\n")), ("d2", "d1", STEHEND), ("d3", "d0", f"{STANDING} {STEHEND}"),
    ]  # fmt: skip
    again, second = run_cut(
        tmp_path, "again", documents([text.split(":", 1)[1] for text in texts]), phases_of, SubstringOptions(tokens=10)
    )
    assert second.stats["spans"] == 0
    assert len(again) == 4


def test_a_text_that_repeats_itself_keeps_one_period(tmp_path: Path) -> None:
    texts, _ = run_cut(
        tmp_path, "clean", documents(["tick tock " * 30 + "stop", "嘀嗒" * 30]), phases_of, SubstringOptions(tokens=8)
    )
    assert texts == ["d0:tick tock stop", "d1:嘀嗒"]


def test_rows_that_an_earlier_stage_removed_hold_nothing(tmp_path: Path) -> None:
    rows = [f"{STANDING}\nnull", "eins", f"zwei\n{STANDING}", f"{STANDING}\ndrei {STEHEND}", f"vier {STEHEND}", f"{STEHEND}！"]
    view = view_without(tmp_path, write_corpus(tmp_path, "web", documents(rows), 3), {"d0", "d1", "d4"})
    expected = [f"d2:zwei\n{STANDING}", f"d3:drei {STEHEND}", "d5:！"]
    texts, manifest = run_cut(tmp_path, "spans", view, phases_of, SubstringOptions(tokens=9, partitions=2))
    assert texts == expected
    assert manifest.ledger.rows_in == 3
    assert [(span["ordinal"], span["kept_ordinal"]) for span in cut_spans(str(directory_of(tmp_path, "spans")))] == [(3, 2), (5, 3)]
    texts, _ = run_cut(tmp_path, "lines", view, lines.phases_of, lines.LineOptions(partitions=2))
    assert texts == [*expected[:2], f"d5:{STEHEND}！"]


def test_marking_leaves_the_text_and_tells_the_bytes(tmp_path: Path) -> None:
    rows = [f"One. {STANDING}", f"Zwei: {STANDING} 完", "three"]
    texts, manifest = run_cut(tmp_path, "clean", documents(rows), phases_of, SubstringOptions(tokens=10, action="mark"))
    assert texts == [f"d{i}:{row}" for i, row in enumerate(rows)]
    table = pq.read_table(directory_of(tmp_path, "clean") / manifest.parts[0]["name"])
    spans = table["duplicate_spans"].to_pylist()
    assert [len(own) for own in spans] == [0, 1, 0]
    assert rows[1].encode()[spans[1][0]["start"] : spans[1][0]["end"]].decode().strip() == STANDING


WORDS = st.lists(st.sampled_from(["a", "b"]), max_size=22).map(" ".join)
MIXED = st.text(
    st.sampled_from(["a", "b", " ", "中", "文", "，", "-", "\n", "é", "\u0301", "ก", "\x00", "😀", "\u3000"]), max_size=26
)
CHINESE = st.text(st.sampled_from("中文"), max_size=22)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(WORDS, CHINESE, MIXED), min_size=1, max_size=6), st.integers(2, 7), st.integers(1, 7), st.integers(0, 99))
def test_any_texts_lose_what_a_suffix_array_finds(rows: list[str], n: int, k: int, seed: int) -> None:
    options = SubstringOptions(tokens=n, anchor_tokens=k, partitions=1 + seed % 3)
    with tempfile.TemporaryDirectory() as directory:
        texts, manifest = run_cut(Path(directory), "clean", documents(rows), phases_of, options, 2, seed, stats_of)
    assert texts == [f"d{i}:{text}" for i, text in enumerate(expected_texts(rows, n)) if text is not None]
    assert manifest.stats["unverified"] == 0


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_cut_into_the_tokens_that_are_documented(text: str) -> None:
    raw = np.frombuffer(text.encode(), np.uint8)
    hashes, starts, ends = np.empty(len(raw), np.uint64), np.empty(len(raw), np.int64), np.empty(len(raw), np.int64)
    count = tokens_of(raw, 0, len(raw), code_table(), hashes, starts, ends)
    assert list(zip(starts[:count].tolist(), ends[:count].tolist(), strict=True)) == plain_tokens(text)


def test_real_texts_lose_the_same_spans_for_any_anchor_and_order(data_pack: Path, tmp_path: Path) -> None:
    table = pq.read_table(data_pack / "near_dup" / "docs.parquet", columns=["text", "lang", "family"]).sort_by("family")
    families = pa.concat_tables([table.filter(pa.compute.equal(table["lang"], lang)).slice(0, 60) for lang in ("en", "zh")])
    rows = families["text"].to_pylist()
    results = []
    for name, options in (
        ("half", SubstringOptions(partitions=2)),
        ("short", SubstringOptions(anchor_tokens=16)),
        ("whole", SubstringOptions(anchor_tokens=50)),
    ):
        texts, manifest = run_cut(tmp_path, name, documents(rows), phases_of, options, part_rows=50, seed=len(name))
        results.append((texts, manifest.stats["spans"], manifest.stats["characters"]))
    assert results[0] == results[1] == results[2]
    assert results[0][2]["cut"] + results[0][2]["rejected"] > 0.2 * results[0][2]["in"]  # versions of the same documents
    left = [text.split(":", 1)[1] for text in results[0][0]]
    windows = [tuple(re.findall(r"\S+", text)[i : i + 200]) for text in left for i in range(len(text.split()) - 199)]
    assert len(windows) == len(set(windows))


def test_the_stage_writes_the_same_bytes_for_any_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(substring, "run_phases", run_here)
    rows = [f"{i} {STANDING} {i * 7} {STEHEND if i % 2 else ''}" for i in range(9)]
    source = write_corpus(tmp_path, "in", documents(rows), 3)
    for name, partitions in (("one", 1), ("two", 4)):
        SubstringDedupStage(input="in", tokens=8, partitions=partitions).run(context_of(tmp_path, name, {"in": source}))
    assert same_bytes(directory_of(tmp_path, "one")) == same_bytes(directory_of(tmp_path, "two"))
