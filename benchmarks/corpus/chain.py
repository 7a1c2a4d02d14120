"""The row-local chain in the FineWeb order (language ID, Gopher repetition and quality, C4, FineWeb) beside datatrove.

Both sides get the same English documents and the same lid.176.ftz, each in a process of its own environment
(`peers/fineweb_order.py`), and their decisions and reasons are compared document by document. `vs_datatrove` is the chain
with language ID, a rejected document going no further; `vs_datatrove_without_language` the four filters; `vs_datatrove_all`
all filters over every document, rejected or not, words shared on both sides; `vs_datatrove_each` each filter by itself.
Chinese is measured on our side only: datatrove has no C4 for it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.measure import ROOT, Usage, arguments, interleave, peer_python, process, publish
from operators.text.fasttext_model import packaged_language_model

_SCRIPT = ROOT / "benchmarks" / "corpus" / "peers" / "fineweb_order.py"
_OWN = ROOT / ".venv" / "bin" / "python"
_CORPUS = ROOT.parent / "shared" / "data" / "corpus"
_LEAST_AGREEMENT = 0.98
# datatrove's names of reasons; all others are compared as they are
REASONS = {
    "dup_para_frac": "duplicate_paragraphs",
    "dup_para_char_frac": "duplicate_paragraph_characters",
    "dup_line_frac": "duplicate_lines",
    "dup_line_char_frac": "duplicate_line_characters",
    **{f"duplicated_{n}_n_grams": f"duplicate_{n}_grams" for n in range(5, 11)},
    "gopher_short_doc": "short",
    "gopher_long_doc": "long",
    "gopher_below_avg_threshold": "short_words",
    "gopher_above_avg_threshold": "long_words",
    "gopher_too_many_hashes": "hashes",
    "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullet_lines",
    "gopher_too_many_end_ellipsis": "ellipsis_lines",
    "gopher_below_alpha_threshold": "few_letters",
    "gopher_enough_stop_words": "few_stop_words",
    "too_few_sentences": "few_sentences",
    "line_punct_ratio": "line_punctuation",
    "short_line_ratio": "short_lines",
    "char_dup_ratio": "duplicate_characters",
    "list_ratio": "line_feeds",
    "low_score": "language",
}


def main() -> None:
    options = arguments(__doc__ or "")
    count = 150 if options.quick else 600
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        documents, size = _write(folder / "en.parquet", "en", count)
        sides = {
            "danlu": _side("danlu", _OWN, folder, "en"),
            "datatrove": _side("datatrove", peer_python("datatrove"), folder, "en"),
        }
        found = interleave(sides, options.rounds)
        agreement, differences = _agreement(folder)
        for name in ("english_whole", "chinese"):
            _write(folder / f"{name}.parquet", name[:2] if name != "chinese" else "zh", 600 if options.quick else 10**9)
        whole = {name: _alone(folder, name) for name in ("english_whole", "chinese")}
    seconds = {name: _medians(usages) for name, usages in found.items()}
    ratio = {
        "vs_datatrove": seconds["datatrove"]["chain"] / seconds["danlu"]["chain"],
        "vs_datatrove_without_language": seconds["datatrove"]["without_language"] / seconds["danlu"]["without_language"],
        "vs_datatrove_all": seconds["datatrove"]["all"] / seconds["danlu"]["all"],
        "vs_datatrove_each": sum(seconds["datatrove"]["each"].values()) / sum(seconds["danlu"]["each"].values()),
    }
    figures = {
        "documents": documents,
        "mb": size / 1e6,
        **{
            tool: {
                "documents_per_cpu_s": documents / measured["chain"],
                "mb_per_cpu_s": size / measured["chain"] / 1e6,
                "documents_per_cpu_s_without_language": documents / measured["without_language"],
                "documents_per_cpu_s_of_all_filters": documents / measured["all"],
                "documents_per_cpu_s_of_each": {name: documents / cpu_s for name, cpu_s in measured["each"].items()},
            }
            for tool, measured in seconds.items()
        },
        "share_of_time": found["danlu"][0].output["share"],
        "agreement": agreement,
        "differences": differences,
        **whole,
    }
    if agreement["chain"] < _LEAST_AGREEMENT:
        raise SystemExit(f"decisions agree on {agreement['chain']:.1%} only, so the ratio does not count: {differences}")
    described = f"../shared/data/corpus/en.parquet, {documents} documents spread evenly over it; zh.parquet"
    publish("corpus.chain", ratio, figures, data=described, quick=options.quick)


def _write(path: Path, language: str, count: int) -> tuple[int, int]:
    """At most `count` documents of the corpus, spread evenly; (documents, bytes of text)."""
    source = _CORPUS / f"{language}.parquet"
    if not source.exists():
        raise FileNotFoundError(f"{source}: this benchmark measures on the data pack beside the checkout")
    table = pq.read_table(source, columns=["id", "text", "source"])
    step = max(1, table.num_rows // count)
    table = table.take(pa.array(range(0, table.num_rows, step))[:count])
    table = table.append_column("lang", pa.array([language] * table.num_rows))
    pq.write_table(table, path)
    return table.num_rows, int(pc.sum(pc.binary_length(table["text"])).as_py())


def _side(tool: str, python: Path, folder: Path, data: str) -> Callable[[], Usage]:
    """One timed run in a process of its own; its CPU seconds are those of the chain."""

    def run() -> Usage:
        command = [python, _SCRIPT, tool, folder / f"{data}.parquet", packaged_language_model(), folder / f"{tool}_{data}.json"]
        usage = process([str(part) for part in command])
        return Usage(usage.output["chain"], usage.wall_s, usage.peak_bytes, usage.output)

    return run


def _medians(usages: list[Usage]) -> dict[str, Any]:
    def median(*keys: str) -> float:
        values = []
        for usage in usages:
            value = usage.output
            for key in keys:
                value = value[key]
            values.append(value)
        return statistics.median(values)

    each = {name: median("each", name) for name in usages[0].output["each"]}
    return {**{name: median(name) for name in ("chain", "without_language", "all")}, "each": each}


def _agreement(folder: Path) -> tuple[dict[str, float], list[list[str]]]:
    """(share of documents with the same decision and reason, in the chain and for each filter; those that differ in the chain)."""
    ours = json.loads((folder / "danlu_en.json").read_text("utf-8"))
    theirs = json.loads((folder / "datatrove_en.json").read_text("utf-8"))

    def same(reason: str | None) -> str | None:
        return REASONS.get(reason, reason) if reason is not None else None

    pairs = [
        ("kept" if a is None else f"{a[0]}:{same(a[1])}", "kept" if b is None else f"{b[0]}:{same(b[1])}")
        for a, b in zip(ours["chain"], theirs["chain"], strict=True)
    ]
    shares = {"chain": statistics.fmean(a == b for a, b in pairs)}
    for name, reasons in ours["each"].items():
        shares[name] = statistics.fmean(same(a) == same(b) for a, b in zip(reasons, theirs["each"][name], strict=True))
    return shares, [[a, b] for a, b in pairs if a != b]


def _alone(folder: Path, name: str) -> dict[str, Any]:
    """Our side alone over a whole file."""
    table = pq.read_table(folder / f"{name}.parquet", columns=["text"])
    size = int(pc.sum(pc.binary_length(table["text"])).as_py())
    output = _side("danlu", _OWN, folder, name)().output
    cpu_s = output["chain"]
    return {
        "documents": table.num_rows,
        "mb": size / 1e6,
        "documents_per_cpu_s": table.num_rows / cpu_s,
        "mb_per_cpu_s": size / cpu_s / 1e6,
        "share_of_time": output["share"],
    }


if __name__ == "__main__":
    main()
