"""Wikipedia dumps: pages, what is rejected, cuts, damage; and wikitext to text."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.sources.wikitext import plain_text
from tests.operators.sources.reading import read_all

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="zh">
  <siteinfo>
    <sitename>Wikipedia</sitename><dbname>zhwiki</dbname>
    <base>https://zh.wikipedia.org/wiki/Wikipedia:%E9%A6%96%E9%A1%B5</base>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">File</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""


def page(number: int, text: str, namespace: int = 0, redirect: str = "", model: str = "wikitext") -> str:
    mark = f'<redirect title="{redirect}" />' if redirect else ""
    return (
        f"  <page>\n    <title>条目 {number}</title><ns>{namespace}</ns><id>{number}</id>{mark}\n"
        f"    <revision><id>{number * 10}</id><contributor><id>7</id></contributor><model>{model}</model>"
        f'<text bytes="1" xml:space="preserve">{escape(text)}</text></revision>\n  </page>\n'
    )


PAGES = [
    page(number, f"'''条目'''是第{number}个[[语言|語言]]条目，含<page>字样。[[Kategorie:测试]]\n" * (1 + number % 5))
    for number in range(60)
]
DUMP = HEAD + "".join(PAGES) + "</mediawiki>\n"


def multistream(streams: list[str]) -> bytes:
    return b"".join(bz2.compress(stream.encode(), 1) for stream in streams)


STREAMS = [HEAD, *("".join(PAGES[start : start + 5]) for start in range(0, 60, 5)), "</mediawiki>\n"]
FILES = {
    "zhwiki-1-pages-articles.xml": DUMP.encode(),
    "zhwiki-1-pages-articles.xml.gz": gzip.compress(DUMP.encode()),
    "zhwiki-1-pages-articles.xml.bz2": bz2.compress(DUMP.encode()),
    "zhwiki-1-pages-articles-multistream.xml.bz2": multistream(STREAMS),
    "zhwiki-1-pages-articles1.xml-p1p60.bz2": bz2.compress(DUMP.encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_page_is_a_document_with_an_id_an_address_and_a_title(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    read = read_all(name, tmp_path)
    assert read.ids == [f"zhwiki-{number}" for number in range(60)]
    assert read.rows[6] == {
        "id": "zhwiki-6",
        "text": "条目是第6个語言条目，含<page>字样。\n条目是第6个語言条目，含<page>字样。",
        "source": name.split(".")[0],
        "url": "https://zh.wikipedia.org/wiki/%E6%9D%A1%E7%9B%AE_6",
        "title": "条目 6",
    }
    assert read.bad == []


@pytest.mark.parametrize("name", ["zhwiki-1-pages-articles.xml", "zhwiki-1-pages-articles-multistream.xml.bz2"])
@pytest.mark.parametrize("unit_bytes", [100, 333, 1000, 4096])
def test_cuts_change_neither_rows_nor_order(tmp_path: Path, name: str, unit_bytes: int) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    whole, cut = read_all(name, tmp_path), read_all(name, tmp_path, max_unit_bytes=unit_bytes)
    assert len(cut.units) > 1
    assert cut.rows == whole.rows
    assert cut.bad == []


def test_bzip2_streams_that_hold_no_whole_pages_are_one_unit(tmp_path: Path) -> None:
    data = DUMP.encode()
    (tmp_path / "pages-articles.xml.bz2").write_bytes(multistream([DUMP[:5000], DUMP[5000:]]))
    read = read_all("pages-articles.xml.bz2", tmp_path, max_unit_bytes=len(data) // 40)
    assert (len(read.units), len(read.rows)) == (1, 60)


def test_redirects_and_other_namespaces_are_rejected_not_quarantined(tmp_path: Path) -> None:
    pages = [page(1, "文章"), page(2, "#REDIRECT [[条目 1]]", redirect="条目 1"), page(3, "讨论", namespace=1)]
    pages += [page(4, "{}", model="json"), page(5, "甲" * 2000)]
    (tmp_path / "a.xml").write_text(HEAD + "".join(pages) + "</mediawiki>", "utf-8")
    read = read_all("a.xml", tmp_path, format="wikipedia", max_text_bytes=3000)
    assert read.ids == ["zhwiki-1"]
    assert [(bad.reason, bad.unwanted) for bad in read.bad] == [
        ("redirect", True), ("namespace_1", True), ("no_wikitext", True), ("too_long", False),
    ]  # fmt: skip
    talk = read_all("a.xml", tmp_path, format="wikipedia", max_text_bytes=3000, wikipedia={"namespaces": [1]})
    assert talk.ids == ["zhwiki-3"]


@pytest.mark.parametrize("name", ["zhwiki-1-pages-articles.xml", "zhwiki-1-pages-articles.xml.gz"])
def test_a_dump_that_is_cut_short_keeps_the_pages_before(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name][: len(FILES[name]) * 2 // 3])
    read = read_all(name, tmp_path)
    assert read.ids == [f"zhwiki-{number}" for number in range(len(read.ids))]
    assert len(read.ids) > 20
    assert read.reasons == ["truncated"]


def test_xml_that_breaks_keeps_the_pages_before_and_units_after(tmp_path: Path) -> None:
    broken = DUMP.replace(PAGES[30], PAGES[30].replace("</title>", "</titel>"))
    (tmp_path / "a.xml").write_text(broken, "utf-8")
    read = read_all("a.xml", tmp_path, format="wikipedia")
    assert (read.ids, read.reasons) == ([f"zhwiki-{number}" for number in range(30)], ["corrupt"])
    cut = read_all("a.xml", tmp_path, format="wikipedia", max_unit_bytes=2000)
    assert len(cut.ids) > 50
    assert cut.reasons == ["corrupt"]


@pytest.mark.parametrize("entity", ['<!ENTITY a "aaaa">', '<!ENTITY a SYSTEM "file:///etc/hostname">'])
def test_entities_are_refused(tmp_path: Path, entity: str) -> None:
    data = f"<!DOCTYPE mediawiki [{entity}]>\n{HEAD}{page(1, 'x').replace('x<', '&a;<')}</mediawiki>"
    (tmp_path / "a.xml").write_text(data, "utf-8")
    read = read_all("a.xml", tmp_path, format="wikipedia")
    assert (read.rows, read.reasons) == ([], ["corrupt"])
    assert "declares an entity ('a')" in read.bad[0].detail


def test_what_wikitext_keeps_and_leaves_out() -> None:
    text = """{{Infobox 语言|名称=中文|人口={{number|13亿}}}}
[[File:Flag.png|thumb|[[旗帜]]说明]]
'''中文'''（{{lang|en|Chinese}}）是一种''语言''<ref>引用{{cite|x}}</ref><ref name="a" />，见[[汉语|汉语]]与[[英语]]。<!-- 注释 -->
-{zh-hans:软件; zh-hant:軟體}-和-{只此}--{H|zh-cn:甲;zh-tw:乙}-。
__NOTOC__
== 历史 ==
* 第一项
* [https://example.org 外部链接]
=== 空的 ===
== 表格 ==
{| class="wikitable"
|+ 标题
! 名 !! 值
|-
| 甲 || 1
|-
| [[乙]] || 2&nbsp;000
|}
<syntaxhighlight lang="python">print("{{不是模板}}")</syntaxhighlight>
<math>a^2 + b_2</math>
== 参考文献 ==
<references />
{{reflist}}
[[Category:语言]] [[分类:中文]] [[:Category:语言]]
== 外部链接 ==
"""
    assert plain_text(text).split("\n") == [
        "中文是一种语言，见汉语与英语。",
        "软件和只此。",
        "",
        "## 历史",
        "- 第一项",
        "- 外部链接",
        "## 表格",
        "",
        "标题",
        "| 名 | 值 |",
        "| 甲 | 1 |",
        "| 乙 | 2 000 |",
        "",
        'print("{{不是模板}}")',
        "a^2 + b_2",
        "## 参考文献",
        "",
        "Category:语言",
    ]
    assert "| 甲 | 1 |" not in plain_text(text, tables="drop")


MARKUP = st.lists(
    st.sampled_from(["[[", "]]", "{{", "}}", "{|", "|}", "|-", "|", "'''", "<ref>", "</ref>", "-{", "}-", "==", "\n", "文", "a "])
)


@settings(max_examples=200, deadline=None)
@given(pieces=MARKUP)
def test_any_markup_becomes_some_text(pieces: list[str]) -> None:
    assert isinstance(plain_text("".join(pieces)), str)
