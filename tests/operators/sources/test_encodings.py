"""Plain text and Markdown in Chinese encodings: found, or taken as given."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from operators.sources.charset import file_encoding
from operators.sources.settings import ReadSettings
from tests.operators.sources.reading import read_all

SIMPLIFIED = [f"第{number}行：这是一个简体中文的文件，内容关于语言与文字，没有别的。" for number in range(200)]
TRADITIONAL = [f"第{number}行：這是一個繁體中文的檔案，內容關於語言與文字，沒有別的。" for number in range(200)]
JAPANESE = [f"{number}行目：これは日本語で書かれた文書です。内容は言葉と文字について。" for number in range(200)]
FILES = {
    "gb18030": SIMPLIFIED, "gbk": SIMPLIFIED, "big5": TRADITIONAL, "shift_jis": JAPANESE, "utf-8": SIMPLIFIED,
    "utf-8-sig": SIMPLIFIED, "utf-16": TRADITIONAL, "utf-32": SIMPLIFIED,
}  # fmt: skip


@pytest.mark.parametrize("encoding", FILES)
@pytest.mark.parametrize("packed", [False, True])
def test_lines_of_any_encoding_are_read(tmp_path: Path, encoding: str, packed: bool) -> None:
    data = "\r\n".join(FILES[encoding]).encode(encoding)
    name = "a.txt.gz" if packed else "a.txt"
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    read = read_all(name, tmp_path)
    assert read.texts == FILES[encoding]
    assert read.bad == []
    assert read_all(name, tmp_path, encoding=encoding).texts == FILES[encoding]
    cut = read_all(name, tmp_path, max_unit_bytes=999)
    assert cut.rows == read.rows
    assert (len(cut.units) > 1) == (not packed and encoding not in ("utf-16", "utf-32"))


@pytest.mark.parametrize("encoding", FILES)
def test_whole_files_of_any_encoding_are_read(tmp_path: Path, encoding: str) -> None:
    text = "# 标题\n\n" + "\n".join(FILES[encoding])
    text = text if encoding not in ("big5", "shift_jis") else text.replace("标题", "標題")
    for name in ("a.md", "b.txt"):
        (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_all(tmp_path, one_document_per="file").texts == [text, text]
    assert read_all("a.md", tmp_path).texts == [text]  # a Markdown file is one document always


def test_one_line_of_another_encoding_is_one_bad_row(tmp_path: Path) -> None:
    lines = [line.encode() for line in SIMPLIFIED[:20]]
    lines[7] = SIMPLIFIED[7].encode("gb18030")
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    read = read_all("a.txt", tmp_path)
    assert (len(read.rows), read.reasons, read.bad[0].row) == (19, ["invalid_utf8"], 7)
    lines = [line.encode("gb18030") for line in SIMPLIFIED[:20]]
    lines[7] = b"\xff\xfe\xff"
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    read = read_all("a.txt", tmp_path)
    assert (len(read.rows), read.reasons, read.bad[0].row) == (19, ["invalid_encoding"], 7)


def test_a_lone_surrogate_in_utf16_costs_its_line_only(tmp_path: Path) -> None:
    data = "一\n".encode("utf-16-le") + b"\x00\xd8\n\x00" + "三\n".encode("utf-16-le")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe" + data)
    read = read_all("a.txt", tmp_path)
    assert (read.texts, read.reasons) == (["一", "三"], ["invalid_utf8"])


def test_chinese_that_begins_late_in_a_file_of_ascii_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"plain ascii line\n" * 30_000 + "\n".join(SIMPLIFIED * 40).encode("gb18030"))
    assert file_encoding(str(path), ReadSettings(path="a")) == "gb18030"


def test_json_lines_are_read_in_a_given_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes("".join(f'{{"text": "{line}"}}\n' for line in SIMPLIFIED).encode("gbk"))
    assert read_all("a.jsonl", tmp_path, encoding="gbk").texts == SIMPLIFIED
    assert set(read_all("a.jsonl", tmp_path).reasons) == {"invalid_utf8"}


def test_an_unknown_encoding_and_binary_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'gb99' is no encoding"):
        ReadSettings(path="a", encoding="gb99")
    (tmp_path / "a.md").write_bytes(bytes(range(256)) * 20)
    assert read_all("a.md", tmp_path).reasons == ["invalid_utf8"]
