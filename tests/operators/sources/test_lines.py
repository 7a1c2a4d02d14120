"""JSONL and plain text."""

from __future__ import annotations

import ast
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.config import SettingsError
from operators.sources import BadRow, ReadSettings, plan_units, read_unit
from tests.conftest import ROOT
from tests.operators.sources.reading import read_all


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def test_rows_carry_their_own_ids_sources_and_addresses(tmp_path: Path) -> None:
    row = {"id": 7, "text": "第一篇", "source": "wiki", "url": "https://example.org/甲"}
    (tmp_path / "a.jsonl").write_bytes(jsonl(row, {"text": "second"}))
    read = read_all("a.jsonl", tmp_path)
    assert read.rows[0] == {"id": "7", "text": "第一篇", "source": "wiki", "url": "https://example.org/甲"}
    assert (read.rows[1]["source"], read.rows[1]["url"]) == ("a", None)
    assert len(read.rows[1]["id"]) == 32


def test_a_given_source_name_wins_over_the_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "x", "source": "wiki"}))
    assert read_all("a.jsonl", tmp_path, source="mine").rows[0]["source"] == "mine"


def test_each_kind_of_bad_line_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good one"}',
        '{"text": "坏编码"}'.encode("gb18030"),
        b'{"text": "unterminated',
        b"[1, 2]",
        b'{"body": "elsewhere"}',
        b'{"id": "n", "text": null}',
        b'{"text": ["a", "b"]}',
        b'{"text": "lone surrogate \\ud800"}',
        '{"text": "好的一行"}'.encode(),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    read = read_all("a.jsonl", tmp_path)
    assert read.texts == ["good one", "好的一行"]
    assert read.reasons == ["invalid_utf8", "bad_json", "bad_json", "missing_text", "missing_text", "not_text", "bad_json"]
    assert [row.row for row in read.bad] == [1, 2, 3, 4, 5, 6, 7]
    assert "(31 of the file)" in read.bad[0].detail  # 21 bytes of the first line, then {"text": "
    assert read.bad[0].where == "a.jsonl: line at byte 21"
    assert "read.text_column" in read.bad[3].detail and "body" in read.bad[3].detail
    assert read.bad[4].id == "n"
    assert read.bad[1].raw == '{"text": "unterminated'


def test_nul_bytes_and_empty_texts_pass_through(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a\x00b"}, {"text": ""}))
    (tmp_path / "b.txt").write_bytes(b"one\x00two\n")
    assert read_all("a.jsonl", tmp_path).texts == ["a\x00b", ""]
    assert read_all("b.txt", tmp_path).texts == ["one\x00two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.html"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    read = read_all(name, tmp_path)
    assert read.bad == []
    assert len(read.rows) == (1 if name == "a.html" else 0)  # an empty page is a page


def test_byte_order_mark_crlf_and_missing_last_line_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    (tmp_path / "a.txt").write_bytes("\ufeff甲\r\n \r\n乙".encode())
    assert read_all("a.jsonl", tmp_path).texts == ["one", "two"]
    assert read_all("a.txt", tmp_path).texts == ["甲", "乙"]


def test_carried_columns_have_one_type_and_refuse_other_values(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 3, "tag": "x", "ok": True}, {"text": "b", "n": 4.5, "tag": {"k": 1}}, {"text": "c", "n": "five"}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    read = read_all("a.jsonl", tmp_path, columns=["n:float64", "tag", "ok:bool"])
    assert [(row["n"], row["tag"], row["ok"]) for row in read.rows] == [(3.0, "x", True), (4.5, '{"k":1}', None)]
    assert read.reasons == ["bad_column"]
    assert "'n' holds a string" in read.bad[0].detail


def test_a_text_over_the_limit_is_set_aside_by_its_bytes_not_its_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "文" * 100}, {"text": "a" * 300}, {"text": "文" * 101}))
    read = read_all("a.jsonl", tmp_path, max_text_bytes=300)
    assert [len(text) for text in read.texts] == [100, 300]
    assert read.reasons == ["too_long"]


def test_unknown_settings_and_column_types_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown type 'int'"):
        ReadSettings(path="a", columns=["n:int"])
    with pytest.raises(ValueError, match="text_column: files of format warc have no named columns"):
        ReadSettings(path="a", format="warc", text_column="body")
    with pytest.raises(ValueError, match="plain text"):
        ReadSettings(path="a", format="jsonl", one_document_per="file")


def test_a_file_of_unknown_name_asks_for_the_format(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_bytes(b"{}")
    with pytest.raises(SettingsError, match=r"a\.dat.*give read\.format"):
        read_all("a.dat", tmp_path)
    assert read_all("a.dat", tmp_path, format="text").texts == ["{}"]


def test_texts_as_whole_files(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "一.txt").write_text("第一行\n第二行\n", "utf-8")
    (tmp_path / "books" / "two.txt").write_bytes(b"\xff\x00\x80")
    read = read_all("books", tmp_path, one_document_per="file")
    assert len(read.units) == 1
    assert read.texts == ["第一行\n第二行\n"]
    assert read.reasons == ["invalid_utf8"]


LINE = st.one_of(st.text(max_size=40), st.just(""), st.sampled_from(["not json", "文字" * 30, '{"text": 1}']))
LINES = st.lists(LINE, max_size=25)
ENDINGS = st.sampled_from([b"\n", b"\r\n"])


def encode(line: str) -> bytes:
    """As it is where it stands for a bad line, else as a document with that text; an empty one is a blank line."""
    return line.encode() if not line or line.startswith(("not", '{"')) else json.dumps({"text": line}).encode()


@settings(max_examples=60, deadline=None)
@given(lines=LINES, unit_bytes=st.integers(1, 200), ending=ENDINGS, last=st.booleans(), batch_rows=st.integers(1, 7))
def test_cuts_change_neither_rows_nor_order_nor_ids(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], unit_bytes: int, ending: bytes, last: bool, batch_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    written = [encode(line) for line in lines]
    (folder / "a.jsonl").write_bytes(ending.join(written) + (ending if last else b""))
    whole = read_all("a.jsonl", folder)
    cut = read_all("a.jsonl", folder, max_unit_bytes=unit_bytes, batches={"batch_rows": batch_rows})
    assert cut.rows == whole.rows

    def places(bad: list[BadRow]) -> list[tuple[str, ...]]:
        return [(row.id, row.where, row.reason, row.detail) for row in bad]

    assert places(cut.bad) == places(whole.bad)
    assert len(whole.rows) + len(whole.bad) == sum(1 for line in written if line.strip())
    assert len(set(whole.ids)) == len(whole.ids)


def test_a_range_of_rows_and_skipped_rows_are_what_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"text": str(number)} for number in range(20))))
    read = ReadSettings(path="a.jsonl")
    unit = plan_units(read, str(tmp_path))[0]
    batches = list(read_unit(unit, read, frozenset({6, 9}), start_row=5, stop_row=12, batch_rows=3))
    assert [row for batch in batches for row in batch.rows.tolist()] == [5, 7, 8, 10, 11]
    assert [text for batch in batches for text in batch.table["text"].to_pylist()] == ["5", "7", "8", "10", "11"]
    assert max(batch.table.num_rows for batch in batches) == 3


_MEASURE = """
import resource, sys
from operators.sources import BadRow, ReadSettings, plan_units, read_unit
read = ReadSettings(path=sys.argv[1])
units = plan_units(read, "/")
import operators.sources.lines
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = [(batch.table.num_rows, [bad.reason for bad in batch.bad]) for unit in units for batch in read_unit(unit, read)]
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(rows, (after - before) // 1024)
"""


@pytest.mark.parametrize("compress", [False, True])
def test_a_line_of_60_megabytes_is_set_aside_in_bounded_memory(tmp_path: Path, compress: bool) -> None:
    path = tmp_path / ("a.jsonl.gz" if compress else "a.jsonl")
    with gzip.open(path, "wb", compresslevel=1) if compress else path.open("wb") as stream:
        stream.write(b'{"text": "before"}\n{"text": "')
        for _ in range(60):
            stream.write(b"0123456789abcdefghij" * 50_000)
        stream.write(b'"}\n{"text": "after"}\n')
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(path)], capture_output=True, text=True, cwd=ROOT, check=True)
    rows, grown = done.stdout.rsplit(" ", 1)
    assert "too_long" in rows
    assert sum(count for count, _ in ast.literal_eval(rows)) == 2
    assert int(grown) < 64, f"reading grew the process by {grown} MiB"
