"""Build the domain examples of `examples/data` from the help pages in its pages.warc.gz, byte for byte.

    python examples/build_help.py [--data examples/data]

A page's title becomes a question, the paragraphs it begins with the answer, in the words of its authors. One page in six is
held out: of those a quiz is made (which of four answers belongs to the question?), of the others conversations and pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resiliparse.parse.html import HTMLTree

ADDRESS = re.compile(r"WARC-Target-URI: https://help\.libreoffice\.org/7\.4/(en-US|zh-CN|zh-TW)/([^?\s]+)\r\n")
QUESTIONS = {
    "en": [
        "In LibreOffice, what is this about: {}?",
        "Please explain this topic of the office help: {}",
        "What does the help say about “{}”?",
    ],
    "zh": [
        "在 LibreOffice 中，“{}”是什么意思？",
        "请说明办公软件帮助中的这个主题：{}",
        "帮助文档里关于“{}”是怎么说的？",
    ],
}
SHORTEST, LONGEST = {"en": 70, "zh": 28}, {"en": 420, "zh": 150}  # characters of an answer


def order(name: str, salt: str) -> int:
    """A fixed number that has nothing to do with the alphabet."""
    return int.from_bytes(hashlib.blake2b(f"{salt}\x00{name}".encode(), digest_size=8).digest(), "big")


def pages(file: Path) -> Iterator[tuple[str, str, bytes]]:
    """(language, name, HTML) of the help pages that were stored as they are. A damaged record is passed over."""
    data, at = file.read_bytes(), 0
    while (at := data.find(b"\x1f\x8b\x08", at)) >= 0:
        member = zlib.decompressobj(31)
        try:
            record = member.decompress(data[at:])
        except zlib.error:
            at += 3
            continue
        at = len(data) - len(member.unused_data)
        head, _, rest = record.partition(b"\r\n\r\n")
        http, _, body = rest.partition(b"\r\n\r\n")
        found = ADDRESS.search(head.decode("utf-8", "replace") + "\r\n")
        if found is None or b"-Encoding" in http:
            continue
        yield found[1][:2], found[2] if found[1] != "zh-TW" else f"tw/{found[2]}", body.removesuffix(b"\r\n\r\n")


def entry(lang: str, page: bytes) -> tuple[str, str] | None:
    """(title, answer) of a page, None where it has no answer of a sensible length."""
    try:
        body = HTMLTree.parse(page.decode("utf-8")).body
    except UnicodeDecodeError:
        return None
    titles = [node.text for node in body.query_selector_all("h1")] if body is not None else []
    if not titles:
        return None
    answer = ""
    for node in body.query_selector_all("p.paragraph"):
        text = " ".join(node.text.split())
        if lang == "zh":
            text = re.sub(r"(?<=[^\x00-\x7f]) (?=[^\x00-\x7f])", "", text)
        if not text or text[-1] not in ".。!！?？" or len(answer) + len(text) > LONGEST[lang]:
            break
        answer += (" " if answer and lang == "en" else "") + text
    title = " ".join(titles[0].split())
    if lang == "zh" and len(re.findall(r"[\u4e00-\u9fff]", answer)) < 0.5 * len(answer):
        return None  # not translated
    return (title, answer) if len(answer) >= SHORTEST[lang] and len(title) <= 60 else None


def build(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of the three files by name."""
    entries: dict[str, list[tuple[str, str, str]]] = {"en": [], "zh": []}
    seen: set[str] = set()
    for lang, name, page in pages(file):
        found = entry(lang, page)
        if found is None or found[1] in seen or found[0] in seen:
            continue
        seen.update(found)
        entries[lang].append((name, *found))
    rows: dict[str, list[dict[str, Any]]] = {"help_chats": [], "help_pairs": [], "help_quiz": []}
    for lang, known in entries.items():
        known.sort(key=lambda item: order(item[0], "position"))
        # Both languages hold out the same pages: a translation of a held-out page would give its answer away.
        held = [item for item in known if order(item[0].removeprefix("tw/"), "held out") % 6 == 0]
        taught = [item for item in known if order(item[0].removeprefix("tw/"), "held out") % 6]
        for number, (name, title, answer) in enumerate(taught):
            question = QUESTIONS[lang][order(name, "question") % 3].format(title)
            other = taught[(number + 1) % len(taught)][2]
            ask, say = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
            wrong = {"role": "assistant", "content": other}
            row = {"id": f"help-{lang}-{name}", "lang": lang}
            rows["help_chats"].append({**row, "messages": [ask, say]})
            rows["help_pairs"].append({**row, "prompt": [ask], "chosen": [say], "rejected": [wrong]})
        for number, (name, title, answer) in enumerate(held):
            question = QUESTIONS[lang][order(name, "question") % 3].format(title)
            choices = [held[(number + step) % len(held)][2] for step in range(1, 4)]
            place = order(name, "place") % 4
            choices.insert(place, answer)
            row = {"id": f"quiz-{lang}-{name}", "lang": lang, "question": question, "choices": choices, "answer": place}
            rows["help_quiz"].append({**row, "reply": answer})  # by which decontamination finds the page
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).parent / "data", help="folder with pages.warc.gz, and to write to"
    )
    folder = parser.parse_args().data
    for name, rows in build(folder / "pages.warc.gz").items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")
        print(f"{name}.jsonl {len(rows):>5} rows {len(text.encode()):>9} bytes  {hashlib.sha256(text.encode()).hexdigest()}")


if __name__ == "__main__":
    main()
