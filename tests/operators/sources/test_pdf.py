"""PDF files as text: Chinese and English, page breaks, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from operators import shards
from operators.corpus import run_unit
from operators.sources import ReadSettings, plan_units
from operators.supervise import READING, Limits, Report, Supervisor, Task
from tests.operators.sources.reading import read_all


def pdf(pages: list[list[str]], encrypted: bool = False) -> bytes:
    """A PDF of the given lines, in a font that names no glyphs but says which characters they stand for."""
    characters = sorted({character for page in pages for line in page for character in line})
    codes = {character: number + 1 for number, character in enumerate(characters)}
    mapping = "\n".join(f"<{codes[c]:04x}> <{c.encode('utf-16-be').hex()}>" for c in characters)
    cmap = (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /X def /CMapType 2 def\n"
        f"1 begincodespacerange <0000> <ffff> endcodespacerange\n{len(characters)} beginbfchar\n{mapping}\nendbfchar\n"
        "endcmap CMapName currentdict /CMap defineresource pop end end"
    )
    objects = ["<</Type/Catalog/Pages 2 0 R>>", ""]
    objects.append(
        "<</Type/Font/Subtype/Type0/BaseFont/X/Encoding/Identity-H/ToUnicode 4 0 R/DescendantFonts[<</Type/Font"
        "/Subtype/CIDFontType2/BaseFont/X/CIDSystemInfo<</Registry(Adobe)/Ordering(Identity)/Supplement 0>>/DW 1000>>]>>"
    )
    objects.append(f"<</Length {len(cmap)}>>stream\n{cmap}\nendstream")
    kids = []
    for page in pages:
        shown = "\n".join(
            f"BT /F 12 Tf 50 {750 - 20 * number} Td <{''.join(f'{codes[c]:04x}' for c in line)}> Tj ET"
            for number, line in enumerate(page)
        )
        kids.append(f"{len(objects) + 1} 0 R")
        resources = "/Resources<</Font<</F 3 0 R>>>>"
        objects.append(f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]{resources}/Contents {len(objects) + 2} 0 R>>")
        objects.append(f"<</Length {len(shown)}>>stream\n{shown}\nendstream")
    objects[1] = f"<</Type/Pages/Kids[{' '.join(kids)}]/Count {len(pages)}>>"
    key = "ab" * 32
    lock = f"/ID[<{key[:32]}><{key[:32]}>]/Encrypt<</Filter/Standard/V 1/R 2/O<{key}>/U<{key}>/P -4>>" if encrypted else ""
    out, places = b"%PDF-1.5\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj{body}endobj\n".encode("latin-1")
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    tail = f"trailer<</Root 1 0 R/Size {len(objects) + 1}{lock}>>\nstartxref\n{len(out)}\n%%EOF"
    return out + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{tail}".encode()


def test_a_file_is_a_document_of_all_its_pages(tmp_path: Path) -> None:
    (tmp_path / "论文").mkdir()
    (tmp_path / "论文" / "a.pdf").write_bytes(pdf([["中文第一行。", "Second line"], ["第二页", "𠀀扩展区"]]))
    read = read_all(tmp_path)
    assert read.rows[0]["text"] == "中文第一行。\nSecond line\n\n第二页\n𠀀扩展区"
    assert read.rows[0]["source"] == "论文"
    assert read_all(tmp_path, format="pdf", pdf={"page_break": "\f"}).texts[0].split("\f")[1] == "第二页\n𠀀扩展区"


def test_files_that_cannot_be_read_are_counted_and_the_others_are_read(tmp_path: Path) -> None:
    whole = pdf([["一页"], ["二页"]])
    (tmp_path / "1.pdf").write_bytes(whole)
    (tmp_path / "2.pdf").write_bytes(pdf([["secret"]], encrypted=True))
    (tmp_path / "3.pdf").write_bytes(b"%PDF-1.7 nothing follows")
    (tmp_path / "4.pdf").write_bytes(pdf([["页"]] * 30))
    (tmp_path / "5.pdf").write_bytes(pdf([[]]))
    (tmp_path / "6.pdf").write_bytes(pdf([[f"第{number}行" + "文字" * 20 for number in range(30)]]))
    (tmp_path / "7.pdf").write_bytes(b"")
    read = read_all(tmp_path, max_text_bytes=3000, pdf={"max_pages": 20}, format="pdf")
    assert read.texts == ["一页\n\n二页"]
    assert [(bad.where, bad.reason, bad.unwanted) for bad in read.bad] == [
        ("2.pdf", "encrypted", False), ("3.pdf", "corrupt", False), ("4.pdf", "too_long", False), ("5.pdf", "no_text", True),
        ("6.pdf", "too_long", False), ("7.pdf", "corrupt", False),
    ]  # fmt: skip
    assert len(read.units) == 1
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "a.pdf").write_bytes(whole)
    assert read_all(tmp_path / "large", format="pdf", pdf={"max_file_bytes": 100}).reasons == ["too_long"]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_whatever_is_left_of_a_file_is_a_row_or_a_bad_row(tmp_path: Path, share: float) -> None:
    data = pdf([["第一页"], ["第二页"]])
    (tmp_path / "a.pdf").write_bytes(data[: int(len(data) * share)])
    read = read_all(tmp_path)
    assert len(read.rows) + len(read.bad) == 1


def test_a_row_that_ends_its_reader_is_found_and_set_aside() -> None:
    supervisor = Supervisor("tests.operators.sources.crash:read_rows", Limits())
    try:
        assert supervisor.run({}) == {
            "2": "while reading: process ended by SIGABRT",
            "4": "while reading: ValueError: not this one",
        }
    finally:
        supervisor.close()


def test_a_file_that_crashed_the_library_is_quarantined_unread_and_the_others_are_kept(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.pdf").write_bytes(pdf([[f"文件 {number}"]]))
    read = ReadSettings(path=str(tmp_path))
    directory = str(tmp_path / "out" / "web" / "f00d")
    unit = plan_units(read, ".")[0]
    given = {"unit": unit.to_json(), "read": read.model_dump(mode="json"), "operators": [], "directory": directory, "key": "k"}
    told: list[Any] = []
    run_unit(Task({**given, "batch_rows": 100, "measure": "none"}, {2: f"{READING}process ended by SIGABRT"}), Report(told.append))
    manifest = shards.finish(directory, stage="web", kind="corpus", fingerprint="f00d", config={}, inputs={})
    assert manifest.ledger.to_json() == {"in": 6, "created": 0, "kept": 5, "rejected": {}, "quarantined": 1}
    assert manifest.stats["quarantine"] == {"read:crash: process ended by SIGABRT": 1}
    assert [message["rows"][0] for message in told if message.get("reading")] == [0, 1, 3, 4, 5]
