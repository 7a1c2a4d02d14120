"""Rebuild `examples/data` from two raw materials, byte for byte.

    python examples/build_data.py --packages DIR --pack DIR [--out examples/data]

`--packages` is a folder in which the Debian 12 documentation packages of `PACKAGES` were unpacked, one folder each:
`apt-get download NAME && dpkg-deb -x NAME_*.deb DIR/NAME`. `--pack` is the public data pack (corpus/, near_dup/,
instruct/). Every choice follows from hashes of names: no clock, no random numbers, no order of directory listings.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from resiliparse.extract.html2text import extract_plain_text

PACKAGES = [
    "libreoffice-help-en-us", "libreoffice-help-zh-cn", "libreoffice-help-zh-tw", "libreoffice-help-de", "libreoffice-help-ja",
    "libreoffice-help-fr", "python3.11-doc", "debian-handbook", "debian-reference-en", "debian-reference-zh-cn", "git-doc",
    "postgresql-doc-15",
]  # fmt: skip

LIBREOFFICE = "usr/share/libreoffice/help/{}"
HANDBOOK = "usr/share/doc/debian-handbook/html/{}"
# (package, folder in it, address of the folder, pages, language): pages of some substance
PAGES = [
    ("libreoffice-help-en-us", LIBREOFFICE.format("en-US"), "https://help.libreoffice.org/7.4/en-US", 150, "en"),
    ("libreoffice-help-zh-cn", LIBREOFFICE.format("zh-CN"), "https://help.libreoffice.org/7.4/zh-CN", 190, "zh"),
    ("libreoffice-help-zh-tw", LIBREOFFICE.format("zh-TW"), "https://help.libreoffice.org/7.4/zh-TW", 70, "zh"),
    ("libreoffice-help-de", LIBREOFFICE.format("de"), "https://help.libreoffice.org/7.4/de", 25, "de"),
    ("libreoffice-help-fr", LIBREOFFICE.format("fr"), "https://help.libreoffice.org/7.4/fr", 20, "fr"),
    ("libreoffice-help-ja", LIBREOFFICE.format("ja"), "https://help.libreoffice.org/7.4/ja", 25, "ja"),
    ("python3.11-doc", "usr/share/doc/python3.11/html", "https://docs.python.org/3.11", 45, "en"),
    ("debian-handbook", HANDBOOK.format("en-US"), "https://debian-handbook.info/browse/en-US/stable", 30, "en"),
    ("debian-handbook", HANDBOOK.format("zh-CN"), "https://debian-handbook.info/browse/zh-CN/stable", 45, "zh"),
    ("debian-handbook", HANDBOOK.format("zh-TW"), "https://debian-handbook.info/browse/zh-TW/stable", 12, "zh"),
    ("debian-handbook", HANDBOOK.format("ru-RU"), "https://debian-handbook.info/browse/ru-RU/stable", 10, "ru"),
    ("debian-reference-en", "usr/share/debian-reference", "https://www.debian.org/doc/manuals/debian-reference", 3, "en"),
    ("debian-reference-zh-cn", "usr/share/debian-reference", "https://www.debian.org/doc/manuals/debian-reference", 5, "zh"),
    ("git-doc", "usr/share/doc/git-doc", "https://git-scm.com/docs", 20, "en"),
    ("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html", "https://www.postgresql.org/docs/15", 45, "en"),
]  # fmt: skip
MAX_PAGE_BYTES = 90_000
DATE = "2024-05-01T00:00:00Z"

# (source in the pack, language in the pack or None for all, documents, shipped in): free licences only
DOCUMENTS = [
    ("python_doc", "en", 70, "documents"), ("en_peps", "en", 50, "documents"), ("en_msvc", "en", 150, "documents"),
    ("otel_docs", "en", 80, "documents"), ("tf_docs_md", "en", 60, "documents"), ("linux_doc", "en", 90, "notes"),
    ("gnome_help", "en", 61, "notes"),
    ("DRCD", "zh-Hant", 160, "documents"), ("CMRC2018", "zh-Hans", 120, "documents"), ("paddle_docs", "zh-Hans", 120, "documents"),
    ("tf_docs_md", "zh-Hans", 70, "documents"), ("zh_javaguide", "zh-Hans", 40, "documents"),
    ("zh_react", "zh-Hans", 30, "documents"), ("zh_poetry", None, 25, "documents"),
    ("zh_advjava", "zh-Hans", 20, "notes"), ("linux_doc", "zh-Hans", 60, "notes"),
    ("otel_docs", "zh-Hans", 50, "notes"), ("gnome_help", "zh-Hans", 40, "notes"),
    ("gnome_help", "other", 40, "documents"), ("otel_docs", "other", 25, "notes"),
]  # fmt: skip
NEAR_DUPLICATES = {"python/peps": 90, "Snailclimb/JavaGuide": 45, "d2l-ai/d2l-zh": 60}  # rows of several versions of one file
DOCUMENT_BYTES = (300, 16_000)
QUALITY_ROWS = 160  # of each language, good and bad


def order(name: str, salt: str = "") -> str:
    """A fixed order that has nothing to do with the alphabet."""
    return hashlib.blake2b(f"{salt}\x00{name}".encode(), digest_size=8).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- pages


def visible(page: bytes) -> str:
    return extract_plain_text(page.decode("utf-8", "replace"), main_content=True)


def letters(text: str) -> int:
    """Length in which a Chinese or Japanese character counts like three of an alphabet."""
    return len(text) + 2 * len(re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]", text))


def choose_pages(packages: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pages to ship, and for the quality sets some that are not shipped."""
    chosen, spare = [], []
    for package, folder, address, wanted, lang in PAGES:
        root = packages / package / folder
        files = sorted((file.relative_to(root).as_posix() for file in root.rglob("*.html")), key=lambda name: order(package + name))
        taken = 0
        for name in files:
            data = (root / name).read_bytes()
            if len(data) > MAX_PAGE_BYTES or name.startswith("genindex"):
                continue
            text = visible(data)
            # One page in twelve may be short: menus and stubs are part of any crawl.
            if letters(text) < 900 and int(order(name), 16) % 12:
                continue
            if lang == "zh" and len(re.findall(r"[\u4e00-\u9fff]", text)) < 0.25 * len(text):
                continue  # not translated
            page = {"url": f"{address}/{name}", "data": data, "lang": lang, "package": package, "text": text}
            if taken < wanted:
                chosen.append(page)
            elif taken < wanted + 60:
                spare.append(page)
            else:
                break
            taken += 1
    return chosen, spare


def swap_charset(page: bytes, encoding: str, declared: str | None) -> bytes:
    """Re-encode a UTF-8 page; its own declaration says `declared`, or nothing."""
    text = page.decode("utf-8")
    text = re.sub(r"<\?xml[^>]*\?>\s*", "", text)
    label = f"charset={declared}" if declared else ""
    text = re.sub(r'(<meta[^>]*?)charset="?utf-8"?', lambda match: match[1] + label, text, flags=re.IGNORECASE)
    if declared is None:
        text = re.sub(r'<meta[^>]*content="text/html; "[^>]*>|<meta\s*/?>', "", text)
    return text.encode(encoding, "xmlcharrefreplace")


def mojibake(page: bytes) -> bytes:
    """UTF-8 read as Latin-1 and saved as UTF-8 again, the commonest accident of the web."""
    return page.decode("latin-1").encode("utf-8")


def older_version(page: bytes) -> bytes:
    """The page as an earlier release had it: another version number, one paragraph less."""
    text = page.decode("utf-8").replace("7.4", "7.3").replace("3.11.2", "3.11.1").replace("15.20", "15.4")
    paragraphs = list(re.finditer(r"<p\b[^>]*>.*?</p>", text, re.DOTALL))
    if len(paragraphs) > 6:
        cut = paragraphs[len(paragraphs) // 2]
        text = text[: cut.start()] + text[cut.end() :]
    return text.encode("utf-8")


def page_variants(pages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Responses to store: every page once, some re-encoded, some twice, some in an older version."""
    responses = []
    counts: dict[str, int] = {}

    def due(kind: str, limit: int) -> bool:
        counts[kind] = counts.get(kind, 0) + 1
        return counts[kind] <= limit

    for number, page in enumerate(pages):
        data, lang, header = page["data"], page["lang"], "text/html; charset=utf-8"
        traditional = "zh-tw" in page["package"] or "/zh-TW/" in page["url"]
        turn = int(order(page["url"], "variant"), 16) % 10
        encoding = ("big5" if traditional else "gb18030") if lang == "zh" else "cp1252" if lang in ("de", "fr", "en") else ""
        if turn == 0 and encoding and due(f"{encoding} declared in the header", 14):
            data, header = swap_charset(data, encoding, encoding), f"text/html; charset={encoding.replace('gb18030', 'gbk')}"
        elif turn == 1 and encoding and due(f"{encoding} declared in the page", 8):
            data, header = swap_charset(data, encoding, "windows-1252" if encoding == "cp1252" else encoding), "text/html"
        elif turn == 2 and encoding and due(f"{encoding} not declared", 8):
            data, header = swap_charset(data, encoding, None), "text/html"
        elif turn == 3 and encoding and due(f"{encoding} declared as utf-8", 6):
            data = swap_charset(data, encoding, "utf-8")
        elif turn == 4 and lang in ("zh", "fr", "de") and due(f"mojibake {lang}", 8):
            data = mojibake(data)
        elif turn == 5:
            header = "text/html"
        coding = {6: "gzip", 7: "chunked", 8: "deflate"}.get(turn, "") if number % 2 else ""
        responses.append({**page, "data": data, "header": header, "coding": coding})
        again = int(order(page["url"], "again"), 16) % 16
        if again == 0:
            responses.append({**page, "url": page["url"] + "?print=1", "header": "text/html; charset=utf-8", "coding": ""})
        elif again == 1:
            older = {"url": page["url"].replace("/7.4/", "/7.3/") + "?previous=1", "data": older_version(page["data"])}
            responses.append({**page, **older, "header": "text/html; charset=utf-8", "coding": ""})
    return sorted(responses, key=lambda response: order(response["url"], "position"))


def http_response(response: dict[str, Any]) -> bytes:
    body, lines = response["data"], ["HTTP/1.1 200 OK", f"Content-Type: {response['header']}", "Server: example"]
    if response["coding"] == "gzip":
        body = gzip.compress(body, mtime=0)
        lines.append("Content-Encoding: gzip")
    elif response["coding"] == "deflate":
        body = zlib.compress(body)
        lines.append("Content-Encoding: deflate")
    elif response["coding"] == "chunked":
        chunks = [body[start : start + 4000] for start in range(0, len(body), 4000)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        lines.append("Transfer-Encoding: chunked")
    if response["coding"] != "chunked":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def warc_record(kind: str, url: str, block: bytes, content_type: str) -> bytes:
    lines = [
        "WARC/1.1",
        f"WARC-Type: {kind}",
        f"WARC-Record-ID: <urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, kind + ' ' + url)}>",
        f"WARC-Date: {DATE}",
        *([f"WARC-Target-URI: {url}"] if kind != "warcinfo" else []),
        f"Content-Type: {content_type}",
        f"Content-Length: {len(block)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode("utf-8") + block + b"\r\n\r\n"


def write_pages(packages: Path, out: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """pages.warc.gz: one gzip member a record. Returns the texts of its pages, and pages left over for the quality sets."""
    pages, spare = choose_pages(packages)
    info = b"software: examples/build_data.py\r\nformat: WARC File Format 1.1\r\n"
    records = [warc_record("warcinfo", "pages", info, "application/warc-fields")]
    responses = page_variants(pages)
    image = (packages / "libreoffice-help-de/usr/share/libreoffice/help/media/helpimg/de/zellvor.png").read_bytes()
    for number, response in enumerate(responses):
        if number == 100:  # a picture between the pages
            block = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(image) + image
            url = "https://help.libreoffice.org/7.4/media/helpimg/de/zellvor.png"
            records.append(warc_record("response", url, block, "application/http; msgtype=response"))
        if number == 200:  # a page with nothing in it
            block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: 0\r\n\r\n"
            url = "https://help.libreoffice.org/7.4/empty.html"
            records.append(warc_record("response", url, block, "application/http; msgtype=response"))
        if number % 150 == 0:
            request = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"
            records.append(warc_record("request", response["url"], request, "application/http; msgtype=request"))
        records.append(warc_record("response", response["url"], http_response(response), "application/http; msgtype=response"))
    members = [gzip.compress(record, 9, mtime=0) for record in records]
    broken = bytearray(gzip.compress(records[300], 9, mtime=0))
    middle = len(broken) // 2
    broken[middle : middle + 64] = bytes(64)  # one record damaged on disk: the next must still be found
    members.insert(300, bytes(broken))
    (out / "pages.warc.gz").write_bytes(b"".join(members))
    return [page["text"] for page in pages], spare


# ------------------------------------------------------------------------------------------------------------ documents


def load_corpus(pack: Path) -> pl.DataFrame:
    """The pack's documents with the short name of the source, where in it they stand, and `other` for the third file's language."""
    frames = []
    for name in ("en", "zh", "other"):
        frame = pl.read_parquet(pack / "corpus" / f"{name}.parquet")
        group = pl.lit("other") if name == "other" else pl.col("lang")
        frames.append(frame.with_columns(group.alias("group")))
    frame = pl.concat(frames)
    place = pl.col("source").str.split(" ")
    return frame.with_columns(place.list.first().alias("name"), place.list.slice(1).list.join(" ").alias("attribution"))


def choose_documents(corpus: pl.DataFrame) -> tuple[list[dict[str, Any]], list[dict[str, Any]], set[str]]:
    """Rows for documents.parquet, rows for notes.jsonl, and the ids of both."""
    low, high = DOCUMENT_BYTES
    sized = corpus.filter(pl.col("text").str.len_bytes().is_between(low, high))
    chosen: dict[str, list[dict[str, Any]]] = {"documents": [], "notes": []}
    for name, group, wanted, file in DOCUMENTS:
        rows = sized.filter((pl.col("name") == name) & (pl.lit(group is None) | (pl.col("group") == (group or ""))))
        found = sorted(rows.to_dicts(), key=lambda row: order(row["id"]))[:wanted]
        if len(found) < wanted:
            print(f"{name} {group}: {len(found)} of {wanted}")
        for row in found:
            fields = {"id": row["id"], "text": row["text"], "source": row["name"], "url": address(row["attribution"])}
            chosen[file].append({**fields, "language": row["lang"], "license": row["license"], "attribution": row["attribution"]})
    ids = {row["id"] for rows in chosen.values() for row in rows}
    return chosen["documents"], chosen["notes"], ids


def address(place: str) -> str | None:
    """`owner/repository:path` as an address; packages and data sets have none."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+):(.+?)(?:@blob \w+)?", place)
    if match is None or "#" in place:
        return None
    return f"https://github.com/{match[1]}/blob/HEAD/{match[2]}"


def near_duplicates(pack: Path) -> Iterator[dict[str, Any]]:
    """Versions of one file from a project's history whose exact Jaccard similarity is at least 0.8 (cluster_80 of the pack)."""
    frame = pl.read_parquet(pack / "near_dup" / "docs.parquet")
    frame = frame.filter(pl.col("text").str.len_bytes().is_between(*DOCUMENT_BYTES) & pl.col("family").is_not_null())
    for repository, wanted in NEAR_DUPLICATES.items():
        rows = frame.filter(pl.col("source").str.starts_with(repository + ":"))
        clusters = {key[0]: group for key, group in rows.group_by("cluster_80") if 2 <= group.height <= 5}
        taken = 0
        for key in sorted(clusters, key=lambda key: order(str(key))):
            if taken >= wanted:
                break
            for row in clusters[key].sort("id").to_dicts():
                taken += 1
                yield {
                    "id": row["id"], "text": row["text"], "source": repository.split("/")[1].lower(), "url": address(row["source"]),
                    "language": "zh-Hans" if row["lang"] == "zh" else "en", "license": row["license"], "attribution": row["source"],
                }  # fmt: skip


# Invented people, reserved numbers and addresses: something for the operators that look for private data and bad words.
PRIVATE = [
    ("en", """Meeting notes. Call Anna Example on +1 202-555-0143 or write to anna.example@example.com before Friday; the
visitor network is at 192.0.2.17. She asked that the invoice be paid with the test card 4111 1111 1111 1111, which no bank
honours. The rest of the meeting was about the order in which the chapters of the manual are to be translated, and who
will read the proofs."""),
    ("zh", """会议记录：请在周五之前联系张三，电话 13800138000，邮箱 zhangsan@example.com，
身份证号 11010519491231002X 仅作格式示例。会议其余部分讨论了手册各章的翻译次序、术语表的维护办法，
以及由谁来校对。大家同意先完成安装一章，因为新用户最常读到它，然后再处理排错一章。"""),
    ("en", """To report a problem with the build, mail build-team@example.org with the log attached. The machine that runs
the nightly tests answers at 198.51.100.23 and, over the newer protocol, at 2001:db8::7. If nobody replies within two days,
telephone the office at (202) 555-0188 and ask for the person on duty; please have the number of the build at hand when
you call."""),
    ("zh", """客服说明：如需退货，请发邮件到 service@example.cn，或拨打 010-55550123。
为保护隐私，请不要在邮件中写出银行卡号 6222020200112233445 之类的信息。工作人员会在两个工作日之内答复，
并告诉您包裹应当寄往哪个仓库。退款一般在收到货物后七天内到账，遇到节假日顺延。"""),
]  # fmt: skip
SPAM = [
    ("en", "hot porn videos free porn sex videos watch porn now free sex chat porn xxx sex free porn videos click here " * 3),
    ("zh", "成人视频 免费色情 黄色电影 在线色情网站 色情图片 点击进入 裸聊 成人电影 色情小说 " * 6),
    ("en", "Buy now! Best price! Click here! Buy now! Best price! Click here! Limited offer! " * 12),
    ("zh", "点击这里立即购买！全网最低价！限时优惠！加微信领取红包！点击这里立即购买！" * 12),
]


def write_documents(pack: Path, out: Path) -> tuple[list[str], set[str]]:
    """documents.parquet and notes.jsonl; returns the texts and ids used."""
    documents, notes, ids = choose_documents(load_corpus(pack))
    versions = list(near_duplicates(pack))
    documents += versions
    ids |= {row["id"] for row in versions}
    documents.sort(key=lambda row: order(row["id"], "position"))
    fields = ["id", "text", "source", "url", "language", "license", "attribution"]
    schema = pa.schema([(name, pa.large_string() if name == "text" else pa.string()) for name in fields])
    table = pa.Table.from_pylist(documents, schema=schema)
    pq.write_table(table, out / "documents.parquet", compression="zstd", compression_level=19, row_group_size=250)

    for number, (lang, text) in enumerate([*PRIVATE, *SPAM]):
        made = {"id": f"made-{number}", "text": text, "source": "made", "url": None, "language": lang}
        notes.append({**made, "license": "CC0-1.0", "attribution": "written for this file"})
    notes.sort(key=lambda row: order(row["id"], "position"))
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in notes]
    lines.insert(20, lines[10])  # a duplicate id
    bad: list[bytes] = [
        '{"id": "bad-utf8", "text": "这一行的编码坏了", "source": "made"}'.encode("gb18030"),
        b'{"id": "bad-json", "text": "the line ends too early, "source": "made"',
        b'["id", "bad-array", "text", "an array is no document"]',
        b'{"id": "bad-missing", "body": "a document without text", "source": "made"}',
        b'{"id": "bad-type", "text": ["one", "two"], "source": "made"}',
        b'{"id": "bad-null", "text": null, "source": "made"}',
        b"",
    ]
    for number, line in enumerate(bad):
        lines.insert(40 * (number + 1), line)
    lines[-1] = lines[-1].replace(b'"text": "', b'"text": "\\u0000')  # a NUL inside a text is kept
    (out / "notes.jsonl").write_bytes(b"\n".join(lines))  # no line end after the last line
    return [row["text"] for row in [*documents, *notes]], ids


# -------------------------------------------------------------------------------------------------------------- quality


def prose(text: str, chinese: bool) -> Iterator[str]:
    """Runs of prose paragraphs: sentences with an end, few marks of markup or code."""
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        if re.search(r"[{}<>|=_\\`#*]|::|http|^[-+.]|//", line):
            continue
        if chinese:
            line = re.sub(r"(?<=[^\x00-\x7f]) (?=[^\x00-\x7f])", "", line)
            han = len(re.findall(r"[\u4e00-\u9fff]", line))
            if han >= 90 and han > 0.7 * len(line) and line[-1] in "。！？" and line.count("，") >= 2:
                yield line
        elif len(line.split()) >= 45 and line[-1] == "." and re.match(r"[A-Z]", line) and line.count(",") >= 1:
            yield line


def write_quality(packages: Path, pack: Path, out: Path, used: set[str], texts: list[str], spare: list[dict[str, Any]]) -> None:
    """Good and bad examples for a classifier, from documents (not `used`) and paragraphs that the corpus files do not hold."""
    shipped = "\n".join(squeeze(text) for text in texts)
    corpus = load_corpus(pack).filter(~pl.col("id").is_in(list(used)))
    good: list[dict[str, Any]] = []
    for lang, names in (
        ("en", ["python_doc", "en_peps", "tf_docs_md", "otel_docs", "en_msvc", "gnome_help", "linux_doc"]),
        ("zh", ["DRCD", "CMRC2018", "zh_javaguide", "tf_docs_md", "zh_react", "paddle_docs", "linux_doc", "otel_docs"]),
    ):
        each: list[list[dict[str, Any]]] = []
        for name in names:
            group = pl.col("group") == "en" if lang == "en" else pl.col("group").str.starts_with("zh")
            rows = sorted(corpus.filter((pl.col("name") == name) & group).to_dicts(), key=lambda row: order(row["id"], "good"))
            found = []
            for row in rows:
                text = next((run for run in prose(row["text"], lang == "zh") if squeeze(run[:2000]) not in shipped), None)
                if text is not None:
                    found.append({"id": f"good-{row['id']}", "text": text[:2000], "language": lang, "source": name,
                                  "license": row["license"], "attribution": row["attribution"]})  # fmt: skip
                if len(found) >= 60:
                    break
            each.append(found)
        good += take_in_turn(each, QUALITY_ROWS)
    write_lines(out / "quality_good.jsonl", good)

    bad: list[dict[str, Any]] = []
    for lang, kinds in (("en", bad_english(packages, spare)), ("zh", bad_chinese(packages, spare))):
        each = [
            [{"text": text, "language": lang, "source": kind, "license": licence, "attribution": origin} for text in texts]
            for kind, licence, origin, texts in kinds
        ]
        bad += take_in_turn(each, QUALITY_ROWS)
    write_lines(out / "quality_bad.jsonl", [{"id": f"bad-{number:04d}", **row} for number, row in enumerate(bad)])


def squeeze(text: str) -> str:
    """Without white space, to find a paragraph however its lines are broken."""
    return "".join(text.split())


def take_in_turn(groups: list[list[dict[str, Any]]], wanted: int) -> list[dict[str, Any]]:
    """`wanted` rows, one from each group in turn until they are used up."""
    taken: list[dict[str, Any]] = []
    for position in range(max(map(len, groups))):
        taken += [group[position] for group in groups if position < len(group)]
    return taken[:wanted]


Kind = tuple[str, str, str, list[str]]  # name, licence, origin, texts
MPL = "MPL-2.0"


def slices(items: list[str], size: int, separator: str, wanted: int = 60) -> list[str]:
    """Lists of `size` neighbouring items, from places spread over the whole."""
    starts = range(0, max(1, len(items) - size), max(size, len(items) // wanted))
    return [separator.join(items[start : start + size]) for start in starts][:wanted]


def menu(packages: Path, package: str, lang: str) -> list[str]:
    source = (packages / package / LIBREOFFICE.format(lang) / "contents.js").read_text("utf-8")
    return [html.unescape(item) for item in re.findall(r">([^<>\\]{2,60})</(?:a|label)>", source)]


def keywords(packages: Path, package: str, lang: str) -> list[str]:
    source = (packages / package / LIBREOFFICE.format(lang) / "bookmarks.js").read_text("utf-8")
    found = re.findall(r'text:"([^"]{2,60})"', source)
    return [item for item in found if lang.startswith("en") or re.search(r"[\u4e00-\u9fff]", item)]


def links(pages: Iterable[dict[str, Any]]) -> list[str]:
    found = []
    for page in pages:
        labels = re.findall(r"<a\b[^>]*>([^<>]{2,40})</a>", page["data"].decode("utf-8", "replace"))
        if len(labels) >= 8:
            found.append(" | ".join(html.unescape(label).strip() for label in labels[:60]))
    return found


def adverts(phrases: list[str], separator: str) -> list[str]:
    """The same few phrases again and again, as on pages made for search engines."""
    return [
        separator.join(phrases[(start * step + turn * step) % len(phrases)] for turn in range(12 + start % 9))
        for step in (1, 2, 3)
        for start in range(12)
    ]


def garbled(pages: Iterable[dict[str, Any]], damage: Callable[[str], str]) -> list[str]:
    return [damage(page["text"][:600]) for page in pages if len(page["text"]) > 300]


def bad_english(packages: Path, spare: list[dict[str, Any]]) -> list[Kind]:
    index = (packages / "python3.11-doc/usr/share/doc/python3.11/html/genindex-all.html").read_text("utf-8")
    entries = [" ".join(html.unescape(item).split()) for item in re.findall(r"<li>([^<>]{2,60})", index)]
    phrases = [
        "Buy cheap software online", "best price guaranteed", "click here now", "free download full version", "visit our shop",
        "limited time offer", "100% free", "sign up today", "top 10 deals", "subscribe to our newsletter", "share this page",
    ]  # fmt: skip
    package, pages = "libreoffice-help-en-us", [page for page in spare if page["lang"] == "en"]

    def without_vowels(text: str) -> str:
        return re.sub(r"(?<=\w)[aeiou]", "\ufffd", text)

    return [
        ("menu", MPL, f"{package} contents.js", slices(menu(packages, package, "en-US"), 25, "\n")),
        ("keywords", MPL, f"{package} bookmarks.js", slices(keywords(packages, package, "en-US"), 30, ", ")),
        ("index", "PSF-2.0", "python3.11-doc genindex-all.html", slices(entries, 40, "\n")),
        ("links", "see README.md", "Debian documentation packages", links(pages)),
        ("adverts", "CC0-1.0", "written for this file", adverts(phrases, "! ")),
        ("garbled", "see README.md", "Debian documentation packages", garbled(pages, without_vowels)),
    ]  # fmt: skip


def bad_chinese(packages: Path, spare: list[dict[str, Any]]) -> list[Kind]:
    phrases = [
        "点击进入", "免费下载", "全网最低价", "限时优惠", "立即购买", "加微信领红包", "官方网站", "注册送大礼",
        "热门推荐", "更多精彩内容请关注公众号", "上一篇", "下一篇", "返回首页", "友情链接", "网站地图",
    ]  # fmt: skip
    package, other = "libreoffice-help-zh-cn", "libreoffice-help-zh-tw"
    pages = [page for page in spare if page["lang"] == "zh"]

    def wrong(text: str) -> str:
        return text.encode("utf-8").decode("gb18030", "replace")

    def latin(text: str) -> str:
        return text.encode("gb18030").decode("latin-1")

    return [
        ("menu", MPL, f"{package} contents.js", slices(menu(packages, package, "zh-CN"), 25, "\n")),
        ("keywords", MPL, f"{package} bookmarks.js", slices(keywords(packages, package, "zh-CN"), 30, "，")),
        ("index", MPL, f"{other} bookmarks.js", slices(keywords(packages, other, "zh-TW"), 40, "\n")),
        ("links", "see README.md", "Debian documentation packages", links(pages)),
        ("adverts", "CC0-1.0", "written for this file", adverts(phrases, "！")),
        ("garbled", "see README.md", "Debian documentation packages", garbled(pages[::2], wrong) + garbled(pages[1::4], latin)),
    ]  # fmt: skip


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild examples/data.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the unpacked Debian packages, one folder each")
    parser.add_argument("--pack", type=Path, required=True, help="folder of the public data pack")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder to write to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PACKAGES if not (arguments.packages / name).is_dir()]
    if missing:
        parser.error(f"--packages lacks {', '.join(missing)}")
    pages, spare = write_pages(arguments.packages, arguments.out)
    documents, used = write_documents(arguments.pack, arguments.out)
    write_quality(arguments.packages, arguments.pack, arguments.out, used, [*pages, *documents], spare)
    for lang in ("en", "zh"):
        name = f"seed_tasks_{lang}.jsonl"
        (arguments.out / name).write_bytes((arguments.pack / "instruct" / name).read_bytes())
    for file in sorted(arguments.out.glob("*.*")):
        data = file.read_bytes()
        print(f"{file.name:24} {len(data):>9}  {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
