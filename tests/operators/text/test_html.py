"""HTML extraction: encodings, media types, bounds, and real pages."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from operators.config import SettingsError
from operators.text.html import ExtractHtml, nesting_depth

ENGLISH = "The committee met on Tuesday to discuss the new library, and most of its members agreed with the plan."
CHINESE = "今天下午，委员会讨论了新图书馆的建设方案，大多数成员都同意这个计划，并决定明年开始施工。"


def page(body: str, head: str = "") -> str:
    menu = "<nav><a href='/'>Home</a> <a href='/x'>Contact</a></nav><script>var x = '<p>no</p>';</script>"
    return f"<html><head><title>A  title</title>{head}</head><body>{menu}<main><p>{body}</p></main></body></html>"


def extract(content: bytes | None, content_type: str | None = "text/html", charset: str | None = None, **options: object) -> dict:
    table = pa.table(
        {
            "id": ["1"],
            "content": pa.array([content], pa.large_binary()),
            "content_type": pa.array([content_type], pa.string()),
            "charset": pa.array([charset], pa.string()),
        }
    )
    verdict = ExtractHtml(**options).process(table)
    assert verdict.reason is not None
    assert verdict.value is not None
    row = verdict.table.to_pylist()[0]
    return {**row, "reason": verdict.reason.to_pylist()[0], "value": verdict.value.to_pylist()[0]}


@pytest.mark.parametrize("extractor", ["danlu", "resiliparse", "trafilatura", "justext"])
@pytest.mark.parametrize("text", [ENGLISH * 3, CHINESE * 5])
def test_the_main_text_is_extracted(extractor: str, text: str) -> None:
    row = extract(page(text).encode(), extractor=extractor, title=True)
    assert text in row["text"]
    assert "Contact" not in row["text"]
    assert "var x" not in row["text"]
    assert (row["reason"], row["title"], row["encoding"], row["broken_characters"]) == (None, "A title", "utf-8", 0)
    assert "content" not in row


@pytest.mark.parametrize(
    ("content", "charset", "codec"),
    [
        (page(CHINESE).encode("gbk"), "gb2312", "gb18030"),
        (page(CHINESE, '<meta charset="gbk">').encode("gbk"), None, "gb18030"),
        (page(CHINESE, '<meta http-equiv="Content-Type" content="text/html; charset=big5">').encode("utf-8"), None, "utf-8"),
        (page(CHINESE * 20).encode("gb18030"), None, "gb18030"),
        (page(CHINESE).encode("utf-8"), "iso-8859-1", "utf-8"),
        (b"\xef\xbb\xbf" + page(CHINESE).encode("utf-8"), "gbk", "utf-8"),
        (b"\xff\xfe" + page(CHINESE).encode("utf-16-le"), None, "utf-16-le"),
        (page(CHINESE).encode("gbk"), "no-such-charset", "gb18030"),
    ],
)  # fmt: skip
def test_encodings_are_found(content: bytes, charset: str | None, codec: str) -> None:
    row = extract(content, charset=charset)
    assert CHINESE in row["text"]
    assert row["encoding"] == codec


def test_the_charset_of_the_content_type_counts() -> None:
    assert CHINESE in extract(page(CHINESE).encode("gbk"), "text/html; charset=GBK")["text"]
    assert "naïve café" in extract(page("naïve café " * 9).encode("latin-1"), "text/html; charset=ISO-8859-1")["text"]


def test_broken_bytes_are_replaced_and_counted() -> None:
    content = page(ENGLISH + CHINESE).encode().replace("下".encode(), b"\xe4\xb8", 1)
    row = extract(content)
    assert (row["reason"], row["broken_characters"], row["encoding"]) == (None, 1, "utf-8")
    assert "\ufffd" in row["text"]


def test_pages_with_too_many_broken_bytes_are_rejected() -> None:
    cut = page(CHINESE).encode().replace("下".encode(), b"\xe4\xb8")
    row = extract(cut, max_broken=0.0)
    assert row["reason"] == "undecodable"
    assert row["value"] > 0


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (None, "text/html", "empty"),
        (b"", "text/html", "empty"),
        (b"<html><body></body></html>", "text/html", "empty"),
        (b"GIF89a...", "image/gif", "content_type"),
        (b"\x89PNG\r\n", None, "content_type"),
        (b"%PDF-1.7", "application/octet-stream", "content_type"),
        (b"{}", "application/json", "content_type"),
        (b"p {}", "text/css", "content_type"),
        (b"x" * 101, "text/html", "too_large"),
    ],
)
def test_what_is_no_page_is_rejected_with_a_reason(content: bytes | None, kind: str | None, reason: str) -> None:
    assert extract(content, kind, max_bytes=100)["reason"] == reason


ARTICLE = f"""<html><body><nav><a href=/>Home</a> <a href=/a>About</a></nav><div class="post-content"><p>{ENGLISH}</p>
<p>{CHINESE * 3}</p>
<table><tr><th>Name</th><th>Age of<br>person</th></tr>
<tr><td>Bob &amp; Al</td><td>12</td></tr><tr><td>李明</td><td></td></tr></table>
<pre class="highlight"><code>def f(x):
    if x &lt; 1:
        return <span class="k">None</span>

\treturn 2
</code></pre>
<div class="highlight"><table><tr><td class="linenos"><pre>1
2</pre></td><td class="code"><pre>a = 1
  b = 2</pre></td></tr></table></div>
<ul><li>{ENGLISH}</li></ul><p>{ENGLISH}</p></div>
<div class="related"><p><a href=/1>Ten other stories</a></p></div><footer>Terms of use</footer></body></html>"""


def test_tables_keep_their_cells_apart_and_code_its_lines_and_indentation() -> None:
    for extractor in ("danlu", "resiliparse"):
        text = extract(ARTICLE.encode(), extractor=extractor)["text"]
        assert "Name | Age of person\nBob & Al | 12\n李明 |" in text, extractor
        assert "def f(x):\n    if x < 1:\n        return None\n\n\treturn 2" in text, extractor
        assert "a = 1\n  b = 2" in text, extractor
    text = extract(ARTICLE.encode())["text"]
    assert "1\n2" not in text, "line numbers are no code"
    assert text.startswith(ENGLISH) and text.endswith(ENGLISH)
    bare = extract(ARTICLE.encode(), tables="drop", code="drop")["text"]
    assert "Bob" not in bare and "def f" not in bare and ENGLISH in bare and CHINESE in bare


def test_tables_that_lay_out_a_page_are_no_data() -> None:
    cells = f"<td><a href=/>Home</a></td><td><p>{ENGLISH}</p><p>{CHINESE * 3}</p></td>"
    layout = f"<html><body><table><tr>{cells}</tr></table></body></html>"
    text = extract(layout.encode())["text"]
    assert ENGLISH in text and CHINESE in text and "|" not in text


def test_justext_cannot_leave_tables_out() -> None:
    with pytest.raises(SettingsError, match="choose another extractor"):
        ExtractHtml(extractor="justext", tables="drop")


def test_a_marked_article_wins_over_the_page_and_what_follows_its_last_sentence_goes() -> None:
    teaser = "<p>" + "Another story that has nothing to do with this one, told at length. " + "</p>"
    body = f"<div class='entry-content'><p>{ENGLISH * 4}</p><p>Tags: library, plan</p></div><div>{teaser}</div>"
    row = extract(f"<html><body><div>{body}</div></body></html>".encode())
    assert row["text"] == ENGLISH * 4


def test_plain_text_passes_untouched() -> None:
    row = extract(f"1 < 2 & <b>\n{CHINESE}".encode(), "text/plain; charset=utf-8")
    assert row["text"] == f"1 < 2 & <b>\n{CHINESE}"


def test_deep_nesting_is_rejected_before_it_costs() -> None:
    row = extract(("<div>" * 200_000 + "x").encode())
    assert (row["reason"], row["value"]) == ("too_deep", 200_000)
    assert nesting_depth("<p>x" * 500 + "<br>" * 500 + "<img src=x>" * 500) == 0
    assert nesting_depth("<!-- " + "<div>" * 99 + " --><script>" + "'<div>'" * 99 + "</script>" + "<b>x</b>" * 99) == 1


def test_nul_bytes_and_surrogate_references_do_no_harm() -> None:
    row = extract(page(ENGLISH + "\x00 &#xD800; &#0;").encode())
    assert ENGLISH in row["text"]
    row["text"].encode("utf-8")


def test_html_strings_and_rows_that_have_text_already() -> None:
    verdict = ExtractHtml().process(pa.table({"html": [page(ENGLISH), None, None], "text": [None, CHINESE, None]}))
    assert verdict.reason is not None
    assert verdict.reason.to_pylist() == [None, None, "empty"]
    assert verdict.table["text"].to_pylist()[1] == CHINESE
    assert verdict.table.column_names == ["text", "encoding", "broken_characters"]
    with pytest.raises(KeyError, match="'content' or 'html'"):
        ExtractHtml().process(pa.table({"text": ["x"]}))


def test_articles_are_recovered_from_real_pages(data_pack: Path) -> None:
    root = data_pack / "html" / "aeb"
    truths = [json.loads(line) for line in (root / "ground_truth.jsonl").open(encoding="utf-8")][:40]
    names = [truth["file"] for truth in truths]
    contents = [gzip.decompress((root / name if (root / name).exists() else root / "html" / name).read_bytes()) for name in names]
    verdict = ExtractHtml().process(pa.table({"content": pa.array(contents, pa.large_binary())}))
    recalls = []
    for truth, text in zip(truths, verdict.table["text"].to_pylist(), strict=True):
        words, found = truth["article_body"].split(), set(text.split())
        recalls.append(sum(word in found for word in words) / max(len(words), 1))
    assert sum(recalls) / len(recalls) > 0.9
