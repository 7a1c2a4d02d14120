"""Lines and paragraphs cut across documents: against a plain reference, for any text and any partitioning."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import shards
from operators.dedup.lines import LineOptions, phases_of
from operators.dedup.normalise import WORDS, normalised_tokens
from operators.dedup.spans import LINE, PARAGRAPH, find_pieces
from pipelines.stages.cutting import LineDedupStage
from pipelines.trace import trace
from tests.operators.dedup.corpus import context_of, directory_of, write_corpus
from tests.operators.dedup.cut import cut_spans, documents, kept_texts, run_cut, same_bytes

MENU = "Home | Products | About the company | Contact"
NOTICE = "版权所有，未经许可不得转载本站内容"
BODY = [
    "The tide came in over the sand flats at noon.",
    "渔船在正午之前都回到了港口，码头上很热闹。",
    "Nobody had seen the lighthouse keeper for days.",
]


def test_a_line_stays_in_the_first_document_and_is_cut_from_the_others(tmp_path: Path) -> None:
    rows = [
        f"{MENU}\n{BODY[0]}\n\n{NOTICE}",
        f"{MENU.lower()}!\n{BODY[1]}\n{NOTICE}\n",
        f"{BODY[2]}\n{BODY[2]}\nshort\nshort",
        f"{BODY[2].upper()}\n{MENU}",
        "",
    ]
    texts, manifest = run_cut(tmp_path, "clean", documents(rows), phases_of, LineOptions(partitions=3), part_rows=2)
    assert texts == [f"d0:{rows[0]}", f"d1:{BODY[1]}\n", f"d2:{BODY[2]}\nshort\nshort", "d4:"]
    ledger = manifest.ledger.to_json()
    assert ledger == {"in": 5, "created": 0, "kept": 4, "rejected": {"line_dedup:too_little_left": 1}, "quarantined": 0}
    spans = cut_spans(str(directory_of(tmp_path, "clean")))
    assert [(s["id"], s["kept_id"], s["documents"], s["rejected"]) for s in spans] == [
        ("d1", "d0", 3, False), ("d1", "d0", 2, False), ("d2", "d2", 1, False), ("d3", "d2", 2, True), ("d3", "d0", 3, True),
    ]  # fmt: skip
    for span in spans:
        raw = rows[int(span["id"][1:])].encode()
        assert raw[span["start_byte"] : span["end_byte"]].decode()[:200] == span["text"]
    assert manifest.equations[0]["name"] == "characters"
    assert manifest.stats["spans"] == 5
    assert manifest.stats["documents_changed"] == 2
    rejects = shards.pq.read_table(directory_of(tmp_path, "clean") / manifest.rejects[0]["name"]).to_pylist()
    assert [(row["id"], row["text"], row["value"]) for row in rejects] == [("d3", rows[3], 0.0)]


def test_trace_tells_what_was_cut_from_a_document_and_who_holds_it(tmp_path: Path) -> None:
    run_cut(tmp_path, "clean", documents([f"{MENU}\n{BODY[0]}", f"{MENU}\n{BODY[1]}"]), phases_of, LineOptions())
    entry = {"directory": f"clean/{'1' * 8}", "status": "done", "inputs": []}
    (tmp_path / "run.json").write_text(json.dumps({"order": ["clean"], "stages": {"clean": entry}}))
    told = [(event.what, event.detail) for event in trace(str(tmp_path), "d1")]
    assert told[0][0] == "kept"
    assert told[1] == ("cut", f"bytes 0..{len(MENU)}, first in d0: {MENU!r}")
    assert ("represents", "holds the first occurrence of 1 spans that were cut") in [
        (event.what, event.detail) for event in trace(str(tmp_path), "d0")
    ]


def test_paragraphs_go_with_the_blank_lines_after_them(tmp_path: Path) -> None:
    one, two, three = f"{BODY[0]}\n{BODY[2]}", f"{BODY[1]}", f"{MENU}\n{NOTICE}"
    rows = [f"{one}\n\n{two}", f"{three}\n \n\n{one}\n\n\nThe end of the story, at last.", f"{three}\n\n{BODY[0]}\n\n{two}"]
    texts, _ = run_cut(tmp_path, "clean", documents(rows), phases_of, LineOptions(unit="paragraph"))
    assert texts == [f"d0:{rows[0]}", f"d1:{three}\n \n\nThe end of the story, at last.", f"d2:{BODY[0]}"]


def test_options_decide_how_many_documents_may_hold_a_line(tmp_path: Path) -> None:
    rows = [f"{MENU}\n{MENU}\n{BODY[i % 3]} {i}{chr(97 + i) * 9}" for i in range(4)]
    own = [row.split("\n")[2] for row in rows]
    cases = {
        "two": ({"documents": 2}, [f"{MENU}\n"] * 2 + [""] * 2),
        "kept": ({"within": "keep"}, [f"{MENU}\n{MENU}\n"] + [""] * 3),
        "nowhere": ({"documents": 3, "everywhere": True}, [""] * 4),
        "allowed": ({"documents": 4, "everywhere": True, "within": "keep"}, [f"{MENU}\n{MENU}\n"] * 4),
    }
    for name, (given_options, expected) in cases.items():
        texts, _ = run_cut(tmp_path, name, documents(rows), phases_of, LineOptions(partitions=2, **given_options))
        assert texts == [f"d{i}:{lead}{line}" for i, (lead, line) in enumerate(zip(expected, own, strict=True))], name


def test_numbers_and_case_can_be_told_apart(tmp_path: Path) -> None:
    rows = ["Total visitors this month: 1204", "total visitors this month 97", "total visitors this month 97"]
    loose, _ = run_cut(tmp_path, "loose", documents(rows), phases_of, LineOptions())
    digits, _ = run_cut(tmp_path, "digits", documents(rows), phases_of, LineOptions(digits="keep"))
    exact, _ = run_cut(tmp_path, "exact", documents([*rows[:2], f"  {rows[1]}\t"]), phases_of, LineOptions(compare="exact"))
    assert (len(loose), len(digits), len(exact)) == (1, 2, 2)


LINES = st.lists(
    st.sampled_from(["ab c", "Ab, C!", "abc", "中文字", "中 文字", "12", "3", "", " ", "é", "e", "x\r", "一1", "\x00", "a\u2028b"]),
    max_size=7,
)
TEXTS = st.lists(LINES.map("\n".join), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(
    TEXTS,
    st.sampled_from([0, 2, 4]),
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from(["cut", "keep"]),
    st.sampled_from(["line", "paragraph"]),
)
def test_any_texts_are_cut_as_a_plain_loop_cuts_them(
    rows: list[str], least: int, documents_kept: int, everywhere: bool, within: str, unit: str
) -> None:
    options = LineOptions(
        min_characters=least, documents=documents_kept, everywhere=everywhere, within=within, unit=unit, partitions=3
    )  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as directory:
        texts, manifest = run_cut(Path(directory), "clean", documents(rows), phases_of, options, part_rows=2)
    expected = reference(rows, least, documents_kept, everywhere, within == "cut", unit)
    assert texts == [f"d{i}:{text}" for i, text in enumerate(expected) if text is not None]
    assert manifest.ledger.rows_in == len(rows)


def reference(rows: list[str], least: int, documents_kept: int, everywhere: bool, within: bool, unit: str) -> list[str | None]:
    """One document after another, with Python's own strings. None: nothing left of it."""
    pieces = [split(row, unit) for row in rows]
    said = [[says(body, least) for body, _ in own] for own in pieces]
    holders: dict[str, list[int]] = {}
    for row, own in enumerate(said):
        for key in {key for key in own if key is not None}:
            holders.setdefault(key, []).append(row)
    results: list[str | None] = []
    for row, own in enumerate(pieces):
        seen: set[str] = set()
        start, gone = 0, set[int]()
        for (body, separator), key in zip(own, said[row], strict=True):
            end = start + len(body + separator)
            if key is not None:
                here = holders[key]
                goes = len(here) > documents_kept if everywhere else here.index(row) >= documents_kept
                if goes or (within and key in seen):
                    gone |= set(range(start, end))
                    before = rows[row][:start]
                    if end == len(rows[row]) and not rows[row].endswith("\n"):  # the last piece takes the separator before it
                        kept = len(before.rstrip(" \t\n\r\x0b\x0c")) if unit == "paragraph" else len(before.removesuffix("\n"))
                        gone |= set(range(kept, start))
                seen.add(key)
            start = end
        text = "".join(character for i, character in enumerate(rows[row]) if i not in gone)
        results.append(None if gone and not text else text)
    return results


def split(text: str, unit: str) -> list[tuple[str, str]]:
    """(body, separator) pieces whose concatenation is the text."""
    if unit == "line":
        return [(match[1], match[2]) for match in re.finditer(r"([^\n]*)(\n|\Z)", text) if match[0]]
    lines = [match[0] for match in re.finditer(r"[^\n]*(?:\n|\Z)", text) if match[0]]
    pieces: list[tuple[str, str]] = []
    for line in lines:
        blank = not line.strip(" \t\n\r\x0b\x0c")
        if blank and pieces:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + line)
        elif pieces and not pieces[-1][1] and not blank:
            pieces[-1] = (pieces[-1][0] + line, "")
        else:
            pieces.append(("", line) if blank else (line, ""))
    return pieces


def says(body: str, least: int) -> str | None:
    tokens = normalised_tokens(body.strip(" \t\n\r\x0b\x0c"), WORDS)
    glued = ""
    for token in tokens:
        spaced = not is_unspaced(token)
        glued += (" " if glued and spaced and not is_unspaced(glued[-1]) else "") + token
    weight = sum(2 if is_unspaced(character) else character != " " for character in glued)
    return glued if weight >= max(least, 1) else None


def is_unspaced(token: str) -> bool:
    return "\u4e00" <= token[-1] <= "\u9fff"


def test_long_texts_need_memory_for_their_long_lines_only() -> None:
    text = pa.array(["x\n" * 500_000, "中" * 400_000, "\n" * 100_000, ("long enough a line %d\n" * 3)], pa.large_string())
    for unit in (LINE, PARAGRAPH):
        found = find_pieces(text, unit, 10)
        assert set(found.rows.tolist()) == ({1, 3} if unit == LINE else {0, 1, 3})


@pytest.mark.usefixtures("ray_cluster")
def test_the_stage_writes_the_same_bytes_for_any_partitions_and_workers(tmp_path: Path) -> None:
    rows = [f"{MENU}\n{BODY[i % 3]}\n{BODY[i % 2]} {i}\n{NOTICE}" for i in range(12)]
    source = write_corpus(tmp_path, "in", documents(rows), 4)
    for name, partitions, workers in (("one", 1, 1), ("two", 5, 2)):
        context = context_of(tmp_path, name, {"in": source}, workers)
        LineDedupStage(input="in", partitions=partitions).run(context)
    one, two = (same_bytes(directory_of(tmp_path, name)) for name in ("one", "two"))
    assert one == two
    assert [text.split(":")[0] for text in kept_texts(str(directory_of(tmp_path, "one")))] == ["d0", "d1", "d2"]
    assert not (directory_of(tmp_path, "one") / "keys").exists()
