"""CSV and TSV: quoting, streams, cuts, and files that break the rules."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.config import SettingsError
from operators.sources.csv import scan
from tests.operators.sources.reading import read_all


def test_quotes_delimiters_and_line_ends_inside_fields(tmp_path: Path) -> None:
    data = 'id,text,url\r\n1,"第一行\r\n第二行, ""引号""",https://example.org/甲\r\n2,5" disk,\r\n\r\n3,"",x'
    (tmp_path / "a.csv").write_bytes(data.encode())
    read = read_all("a.csv", tmp_path)
    assert [(row["id"], row["text"], row["url"]) for row in read.rows] == [
        ("1", '第一行\r\n第二行, "引号"', "https://example.org/甲"), ("2", '5" disk', ""), ("3", "", "x"),
    ]  # fmt: skip
    assert read.bad == []


def test_tab_separated_files_and_files_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tid\n一,二\tx\n", "utf-8")
    (tmp_path / "b.csv").write_bytes("\ufeff甲;1\n乙;2\n".encode())
    assert [(row["id"], row["text"]) for row in read_all("a.tsv", tmp_path).rows] == [("x", "一,二")]
    read = read_all("b.csv", tmp_path, csv={"delimiter": ";", "column_names": ["text", "n"]}, columns=["n:int64"])
    assert [(row["text"], row["n"]) for row in read.rows] == [("甲", 1), ("乙", 2)]
    assert len(set(read.ids)) == 2


def test_wrong_numbers_of_fields_and_wrong_types_are_set_aside_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,n\na,x,1\nb,y\nc,z,1,2\nd,好,\ne,w,five\nf,v,6\n", "utf-8")
    read = read_all("a.csv", tmp_path, columns=["n:int64"])
    assert [(row["id"], row["n"]) for row in read.rows] == [("a", 1), ("d", None), ("f", 6)]
    assert read.reasons == ["bad_csv", "bad_csv", "bad_column"]
    assert read.bad[0].detail == "2 fields, the header has 3"
    assert read.bad[0].raw == "b,y\n"
    assert read.bad[0].where == "a.csv: record at byte 16"


@pytest.mark.parametrize(("encoding", "name"), [("gb18030", "gbk.csv"), ("big5", "big5.csv"), ("utf-16", "wide.csv")])
@pytest.mark.parametrize("given_encoding", [False, True])
def test_chinese_encodings_are_found_or_taken_as_given(tmp_path: Path, encoding: str, name: str, given_encoding: bool) -> None:
    sentence = (
        "這是一個繁體中文的檔案，內容關於語言與文字。" if encoding == "big5" else "这是一个简体中文的文件，内容关于语言与文字。"
    )
    rows = [[str(number), f'{sentence * 3}\n"{number}"'] for number in range(50)]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["id", "text"], *rows])
    (tmp_path / name).write_bytes(buffer.getvalue().encode(encoding))
    read = read_all(name, tmp_path, encoding=encoding if given_encoding else "auto")
    assert [[row["id"], row["text"]] for row in read.rows] == rows
    assert read.bad == []


def test_a_value_that_is_no_text_in_the_files_encoding_costs_its_row_only(tmp_path: Path) -> None:
    good = "这是一个简体中文的文件，内容关于语言与文字。".encode("gb18030")
    (tmp_path / "a.csv").write_bytes(b"text\n" + (good + b"\n") * 30 + b"\xff\xff\n" + good + b"\n")
    read = read_all("a.csv", tmp_path, encoding="gbk")
    assert (len(read.rows), read.reasons, read.bad[0].row) == (31, ["invalid_encoding"], 30)


def test_an_unclosed_quote_costs_its_line_only(tmp_path: Path) -> None:
    lines = ["id,text", *(f"{number},行 {number}" for number in range(300))]
    lines[101] = '100,"never closed'
    (tmp_path / "a.csv").write_text("\n".join(lines), "utf-8")
    read = read_all("a.csv", tmp_path)
    assert read.ids == [str(number) for number in range(300) if number != 100]
    assert read.reasons == ["bad_quotes"]
    assert read.bad[0].raw == '100,"never closed\n'


def test_a_record_that_is_too_long_is_dropped_without_being_held(tmp_path: Path) -> None:
    long = "文" * 2_000_000
    (tmp_path / "a.csv").write_text(f'id,text\na,x\nb,{long}\nc,"{long}\n{long}"\nd,y\n', "utf-8")
    read = read_all("a.csv", tmp_path, max_text_bytes=10_000)
    assert read.ids == ["a", "d"]
    assert read.reasons == ["too_long"] * 3  # the record in quotes is given up line by line


def test_a_truncated_compressed_file_keeps_what_came_before(tmp_path: Path) -> None:
    data = "id,text\n" + "".join(f'{number},"行\n{number * 7919}"\n' for number in range(5000))
    packed = gzip.compress(data.encode())
    (tmp_path / "a.csv.gz").write_bytes(packed[: len(packed) // 2])
    read = read_all("a.csv.gz", tmp_path)
    assert read.reasons == ["truncated"]
    assert read.ids == [str(number) for number in range(len(read.ids))]
    assert len(read.ids) > 1000
    (tmp_path / "a.csv.gz").write_bytes(packed)
    (tmp_path / "a.csv").write_text(data, "utf-8")
    assert read_all("a.csv.gz", tmp_path).texts == read_all("a.csv", tmp_path).texts


def test_columns_that_are_named_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,body\n1,x\n")
    with pytest.raises(SettingsError, match=r"no column 'text' \(read.text_column\); its columns: id, body"):
        read_all("a.csv", tmp_path)
    (tmp_path / "b.csv").write_text("text,text\n1,x\n")
    with pytest.raises(SettingsError, match="stands twice"):
        read_all("b.csv", tmp_path)
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "header.csv").write_bytes(b"id,text")
    assert read_all("empty.csv", tmp_path).rows == read_all("header.csv", tmp_path).rows == []


FIELD = st.text(st.sampled_from(["a", "文", '"', ",", "\n", "\r", " ", "\x00", "\t"]), max_size=6)
ROWS = st.lists(st.tuples(FIELD, FIELD), max_size=15)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, always=st.booleans(), ending=st.sampled_from(["\n", "\r\n"]), last=st.booleans(), batch=st.integers(1, 5))
def test_what_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], always: bool, ending: str, last: bool, batch: int
) -> None:
    buffer = io.StringIO()
    always |= any("\r" in field for row in rows for field in row)  # which csv leaves bare otherwise
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL if always else csv.QUOTE_MINIMAL, lineterminator=ending)
    writer.writerows([("text", "n"), *rows])
    data = buffer.getvalue() if last else buffer.getvalue().removesuffix(ending)
    folder = tmp_path_factory.mktemp("csv")
    (folder / "a.csv").write_bytes(data.encode())
    read = read_all("a.csv", folder, columns=["n"], batches={"batch_rows": batch})
    assert [(row["text"], row["n"]) for row in read.rows] == rows
    assert read.bad == []
    assert len(set(read.ids)) == len(rows)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, unit_bytes=st.integers(1, 60))
def test_cuts_at_line_ends_change_nothing_where_quotes_hold_none(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], unit_bytes: int
) -> None:
    plain = [tuple(field.replace("\n", "").replace("\r", "") for field in row) for row in rows]
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([("text", "n"), *plain])
    folder = tmp_path_factory.mktemp("csv")
    (folder / "a.csv").write_bytes(buffer.getvalue().encode())
    options: dict[str, Any] = {"columns": ["n"], "csv": {"quoted_newlines": False}}
    whole, cut = read_all("a.csv", folder, **options), read_all("a.csv", folder, max_unit_bytes=unit_bytes, **options)
    assert [(row["text"], row["n"]) for row in whole.rows] == plain
    assert cut.rows == whole.rows


@settings(max_examples=40, deadline=None)
@given(data=st.text(st.sampled_from(["a", '"', ",", "\n", "\r"]), max_size=60), quoted=st.booleans())
def test_any_bytes_are_rows_or_bad_rows_and_reading_ends(tmp_path_factory: pytest.TempPathFactory, data: str, quoted: bool) -> None:
    folder = tmp_path_factory.mktemp("csv")
    (folder / "a.csv").write_bytes(b"text,n\n" + data.encode())
    read = read_all("a.csv", folder, csv={"quoted_newlines": quoted})  # checks that row numbers are dense
    if '"' not in data:
        lines = [line for line in data.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line]
        assert len(read.rows) + len(read.bad) == len(lines)


def slow_scan(data: bytes, over_lines: bool) -> list[int]:
    """Record ends, one byte at a time, as RFC 4180 puts it."""
    ends, position, inside, plain = [], 0, False, False
    while position < len(data):
        byte = data[position : position + 1]
        if inside and byte == b'"' and data[position + 1 : position + 2] == b'"':
            position += 2
            continue
        if byte == b'"' and (inside or not plain):
            inside, plain = not inside, False
            position += 1
            if not inside and data[position : position + 1] not in (b",", b"\r", b"\n", b""):
                plain = True
            continue
        if byte in (b"\r", b"\n") and not (inside and over_lines):
            position += 2 if data[position : position + 2] == b"\r\n" else 1
            ends.append(position)
            inside = plain = False
            continue
        plain = byte != b"," if not inside else plain
        position += 1
    return ends


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from(["a", '"', ",", "\n", "\r"]), max_size=40), cut=st.integers(0, 40), over_lines=st.booleans())
def test_the_scan_equals_a_slow_one_wherever_blocks_end(text: str, cut: int, over_lines: bool) -> None:
    data = text.encode()
    found, state = [], 0
    for start, block in ((0, data[:cut]), (len(data[:cut]), data[cut:])):
        ends = np.empty(len(block) + 1, np.int64)
        count, state = scan(np.frombuffer(block, np.uint8), state, ord(","), ord('"'), over_lines, ends)
        found += [start + int(end) for end in ends[:count]]
    if state == 4:  # the last byte is a CR, whose record ends at the end
        found.append(len(data))
    assert found == slow_scan(data, over_lines)
