"""Main content of web pages: pages a second and F1 against known articles, beside resiliparse, trafilatura and jusText.

Three sets of real pages. `articles`: scrapinghub's article-extraction-benchmark, hand-made article bodies, by its own
measure: precision and recall of 4-word shingles as multisets, averaged over pages, F1 of the two averages. `readability`: the
test pages of Mozilla's Readability and the text that it expects, by the same measure. `snippets`: trafilatura's evaluation
set, by its measure: strings that must and must not be in the result. For Chinese news pages there is no truth: the share
of the page's visible Chinese characters that is kept, and pages left empty, are told apart.

All sides get the same decoded markup, one page after the other on one core.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import justext
import trafilatura
from fastwarc.warc import ArchiveIterator, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from benchmarks.measure import ROOT, arguments, in_process, interleave, publish
from operators.text import encoding, main_content
from operators.text.html import _justext

_PACK = ROOT.parent / "shared" / "data" / "html"
_TOKEN = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")  # words; Chinese characters one by one
_HAN = re.compile(r"[\u3400-\u9fff]")
_SHINGLE = 4
_SETS = {"article_text": "readability", "snippets": "snippets", "none": "chinese"}


@dataclass(frozen=True)
class _Page:
    kind: str
    markup: str
    article: str = ""
    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()


def _pages(folder: Path) -> list[_Page]:
    """Raises FileNotFoundError where there is no labelled data pack."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: this benchmark needs the pages of the data pack")
    found = []
    for line in (folder / "aeb" / "ground_truth.jsonl").read_text("utf-8").splitlines():
        truth = json.loads(line)
        page = encoding.decode(gzip.decompress((folder / "aeb" / truth["file"]).read_bytes()))
        found.append(_Page("articles", page.text.replace("\x00", ""), truth["article_body"]))
    truths = {}
    for line in (folder / "web" / "ground_truth.jsonl").read_text("utf-8").splitlines():
        truth = json.loads(line)
        truths[truth["record_id"]] = truth
    with (folder / "web" / "pages.warc.gz").open("rb") as stream:
        for record in ArchiveIterator(stream, record_types=WarcRecordType.response):
            truth = truths[record.headers["WARC-Record-ID"]]
            page = encoding.decode(record.reader.read(), record.http_charset)
            wanted, unwanted = truth.get("must_have") or (), truth.get("must_not_have") or ()
            kind = _SETS[truth["kind"]]
            found.append(
                _Page(kind, page.text.replace("\x00", ""), truth.get("article_body") or "", tuple(wanted), tuple(unwanted))
            )
    return found


def _danlu(markup: str) -> str:
    return main_content.extract(HTMLTree.parse(markup), markup)


def _resiliparse(markup: str) -> str:
    return extract_plain_text(HTMLTree.parse(markup), preserve_formatting=True, main_content=True, alt_texts=False)


def _trafilatura(markup: str) -> str:
    return trafilatura.extract(markup, include_comments=False, include_tables=True) or ""


def _trafilatura_fast(markup: str) -> str:
    return trafilatura.extract(markup, include_comments=False, include_tables=True, fast=True) or ""


def _justext_by_language(markup: str) -> str:
    return _justext(HTMLTree.parse(markup), markup)


def _justext_english(markup: str) -> str:
    paragraphs = justext.justext(markup.encode("utf-8", "replace"), justext.get_stoplist("English"), encoding="utf-8")
    return "\n".join(paragraph.text for paragraph in paragraphs if not paragraph.is_boilerplate)


_EXTRACTORS: dict[str, Callable[[str], str]] = {
    "danlu": _danlu,
    "resiliparse": _resiliparse,
    "trafilatura": _trafilatura,
    "trafilatura_fast": _trafilatura_fast,
    "justext": _justext_by_language,
    "justext_english": _justext_english,
}


def _shingles(text: str) -> Counter[tuple[str, ...]]:
    words = _TOKEN.findall(text)
    return Counter(tuple(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1)) if words)


def _precision_and_recall(truth: str, text: str) -> tuple[float, float]:
    """Of one page; as in the benchmark, nothing found where nothing was to be found is perfect."""
    wanted, found = _shingles(truth), _shingles(text)
    right, wrong, missed = (sum(counts.values()) for counts in (wanted & found, found - wanted, wanted - found))
    if wrong == missed == 0:
        return 1.0, 1.0
    return right / max(right + wrong, 1), right / max(right + missed, 1)


def _f1(precision: float, recall: float) -> dict[str, float]:
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(precision + recall, 1e-9)}


def _score(pages: Sequence[_Page], texts: Sequence[str], visible: Sequence[str]) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for kind in ("articles", "readability"):
        each = [_precision_and_recall(page.article, text) for page, text in zip(pages, texts, strict=True) if page.kind == kind]
        scores[kind] = _f1(statistics.mean(one for one, _ in each), statistics.mean(two for _, two in each))
    right = wrong = missed = kept = seen = empty = 0
    for page, text, everything in zip(pages, texts, visible, strict=True):
        right += sum(item in text for item in page.wanted)
        missed += sum(item not in text for item in page.wanted)
        wrong += sum(item in text for item in page.unwanted)
        if page.kind == "chinese":
            kept, seen = kept + len(_HAN.findall(text)), seen + len(_HAN.findall(everything))
            empty += not text.strip()
    scores["snippets"] = _f1(right / max(right + wrong, 1), right / max(right + missed, 1))
    scores["chinese"] = {"characters_kept": kept, "share_of_visible": kept / max(seen, 1), "empty_pages": empty}
    scores["empty_pages"] = sum(not text.strip() for text in texts)
    scores["mean_f1"] = statistics.mean(scores[kind]["f1"] for kind in ("articles", "readability", "snippets"))
    return scores


def main() -> None:
    options = arguments(__doc__ or "")
    pages = _pages(_PACK)
    if options.quick:
        pages = pages[::4]
    megabytes = sum(len(page.markup.encode("utf-8", "replace")) for page in pages) / 1e6
    sides = {
        name: lambda work=work: in_process(lambda: [work(page.markup) for page in pages]) for name, work in _EXTRACTORS.items()
    }
    for work in _EXTRACTORS.values():
        work(pages[0].markup)  # what is loaded at the first call
    measured = interleave(sides, options.rounds)
    visible = [extract_plain_text(HTMLTree.parse(page.markup)) for page in pages]
    figures: dict[str, Any] = {"pages": dict(Counter(page.kind for page in pages)), "megabytes": megabytes}
    seconds = {}
    for name, usages in measured.items():
        seconds[name] = statistics.median(usage.cpu_s for usage in usages)
        figures[name] = {
            "pages_per_cpu_s": len(pages) / seconds[name],
            "mb_per_cpu_s": megabytes / seconds[name],
            **_score(pages, usages[0].output, visible),
        }
    ratio = {f"vs_{name}": seconds[name] / seconds["danlu"] for name in _EXTRACTORS if name != "danlu"}
    ratio |= {f"f1_vs_{name}": figures["danlu"]["mean_f1"] / figures[name]["mean_f1"] for name in _EXTRACTORS if name != "danlu"}
    publish("corpus.html", ratio, figures, data="data pack html/aeb and html/web", quick=options.quick)


if __name__ == "__main__":
    main()
