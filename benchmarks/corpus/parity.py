"""Do the filters decide as datatrove's do, and does MinHash keep the same documents?

English: Gopher quality and repetition, C4 (both ways) and FineWeb over every English document of the data pack, each filter
alone on the whole text. Chinese: the three filters at FineWeb-2's limits for cmn_Hani. A document agrees if it is kept or
rejected alike; `reasons` counts equal reasons, `texts` the kept documents that C4 leaves different.

MinHash at 14 x 8, three comparisons: the shingles; what stays, ours against datatrove's with three seeds each (datatrove
against itself with other seeds is the measure: the permutations are drawn at random); and what our buckets and components
make of datatrove's own signatures, which must be what its stages 2 to 4 make of them. Of a cluster the first is taken to stay.

`--write` puts the tables into docs/parity.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from benchmarks import measure
from operators.dedup import components
from operators.dedup.join import join_records
from operators.dedup.keys import document_keys
from operators.dedup.options import DedupOptions
from operators.dedup.reference import shingles
from operators.filters.c4 import C4Quality
from operators.filters.fineweb import FineWebQuality
from operators.filters.gopher_quality import GopherQuality
from operators.filters.gopher_repetition import GopherRepetition
from operators.operator import Operator
from operators.text.analysis import Analysis

DATA = measure.ROOT.parent / "shared" / "data"
SCRIPT = Path(__file__).parent / "peers" / "decisions.py"
REPORT = measure.ROOT / "docs" / "parity.md"
SEEDS = (1, 2, 3)
REASONS = {
    "gopher_short_doc": "short", "gopher_long_doc": "long", "gopher_below_avg_threshold": "short_words",
    "gopher_above_avg_threshold": "long_words", "gopher_too_many_hashes": "hashes", "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullet_lines", "gopher_too_many_end_ellipsis": "ellipsis_lines",
    "gopher_below_alpha_threshold": "few_letters", "gopher_enough_stop_words": "few_stop_words",
    "dup_para_frac": "duplicate_paragraphs", "dup_para_char_frac": "duplicate_paragraph_characters",
    "dup_line_frac": "duplicate_lines", "dup_line_char_frac": "duplicate_line_characters",
    **{f"duplicated_{n}_n_grams": f"duplicate_{n}_grams" for n in range(5, 11)},
    "too_few_sentences": "few_sentences", "line_punct_ratio": "line_punctuation", "short_line_ratio": "short_lines",
    "char_dup_ratio": "duplicate_characters", "list_ratio": "line_feeds",
}  # fmt: skip
"""datatrove's reasons in our words; those that are not listed have the same name."""


@dataclass
class Agreement:
    """What two filters made of the same documents. `differ`: (id, theirs, ours, our value) where reason or text is unequal."""

    documents: int = 0
    decisions: int = 0
    reasons: int = 0
    texts: int = 0
    kept: int = 0
    differ: list[tuple[str, str | None, str | None, float | None]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "kept_by_datatrove": self.kept,
            "decisions": round(self.decisions / max(self.documents, 1), 6),
            "reasons": round(self.reasons / max(self.documents, 1), 6),
            "texts_that_differ": self.texts,
            "classes": {f"{theirs} / {ours}": count for (theirs, ours), count in self.classes().most_common()},
            "examples": [list(each) for each in self.differ[:40]],
        }

    def classes(self) -> Counter[tuple[str, str]]:
        return Counter((theirs or "kept", ours or "kept") for _, theirs, ours, _ in self.differ)


def operators(language: str) -> dict[str, Operator]:
    if language == "en":
        return {
            "gopher_quality": GopherQuality(),
            "gopher_repetition": GopherRepetition(),
            "c4_quality": C4Quality(),
            "c4_quality_terminal": C4Quality(terminal_punctuation=True),
            "fineweb_quality": FineWebQuality(),
        }
    return {
        "gopher_quality": GopherQuality(preset="fineweb2"),
        "gopher_repetition": GopherRepetition(),
        "fineweb_quality": FineWebQuality(preset="fineweb2"),
    }


def documents(language: str, limit: int | None = None, directory: Path = DATA) -> pa.Table:
    """id, text, lang; `limit` takes them evenly spread. Raises FileNotFoundError where there is no data pack."""
    rows = pq.read_table(directory / "corpus" / f"{language}.parquet", columns=["id", "text"])
    if limit is not None and limit < rows.num_rows:
        rows = rows.take(pa.array(np.linspace(0, rows.num_rows - 1, limit).astype(np.int64)))
    return rows.append_column("lang", pa.array([language] * rows.num_rows))


def write_jsonl(rows: pa.Table, path: Path) -> Path:
    lines = (json.dumps({"id": row["id"], "text": row["text"]}, ensure_ascii=False) for row in rows.to_pylist())
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def peer(*command: str | Path) -> measure.Usage:
    return measure.process([measure.peer_python("datatrove"), SCRIPT, *command])


def compare_filters(rows: pa.Table, language: str, folder: Path) -> dict[str, Agreement]:
    """Every filter of both, one document after the other."""
    out = folder / f"{language}.out"
    peer("filters", write_jsonl(rows, folder / f"{language}.jsonl"), out, language)
    theirs = [json.loads(line) for line in out.read_text("utf-8").split("\n") if line]
    found: dict[str, Agreement] = {}
    for name, operator in operators(language).items():
        verdict = operator.process(rows)
        assert verdict.reason is not None
        reasons, texts = verdict.reason.to_pylist(), verdict.table["text"]
        values = verdict.value.to_pylist() if verdict.value is not None else [None] * len(reasons)
        result = found[name] = Agreement(len(theirs))
        for row, each in enumerate(theirs):
            expected, ours = REASONS.get(each[name], each[name]), reasons[row]
            changed = expected is ours is None and each.get(f"{name}_text", texts[row].as_py()) != texts[row].as_py()
            result.kept += expected is None
            result.decisions += (expected is None) == (ours is None)
            result.reasons += expected == ours
            result.texts += changed
            if expected != ours or changed:
                result.differ.append((each["id"], expected, ours, values[row]))
    return found


def kept_by_us(rows: pa.Table, seed: int) -> set[str]:
    """The ids that stay: of each component of documents that share a band, the first."""
    options = DedupOptions(method="minhash", exact=False, bands=14, rows=8, permutations=112, seed=seed, similarity=False)
    keys = document_keys(rows, np.arange(rows.num_rows, dtype=np.uint64), options, with_ids=False)
    return _first_of_components(rows["id"].to_pylist(), keys.records["bands"])


def kept_by_our_buckets(ids: Sequence[str], signatures: Path) -> set[str]:
    """The same from datatrove's signatures."""
    bands = json.loads(signatures.read_text("utf-8"))
    records = np.array([[xxhash.xxh64_intdigest(f"{band}:{value}".encode()), row] for row, band, value in bands], np.uint64)
    return _first_of_components(ids, records.reshape(-1, 2))


def _first_of_components(ids: Sequence[str], records: np.ndarray) -> set[str]:
    joined = join_records(records)
    nodes, roots = components.connected_components(joined.larger, joined.smaller)
    return set(ids) - {ids[int(node)] for node in nodes[nodes != roots]}


def _keep_first(ids: Sequence[str], kept: set[str], clusters: list[list[int]]) -> set[str]:
    """datatrove's kept set with the first document of each cluster in place of the one it keeps: the root of a union by
    size, which depends on the order of the pairs. Raises ValueError if a cluster keeps another number than one."""
    members: dict[int, list[str]] = {}
    for document, cluster in sorted(clusters):
        members.setdefault(cluster, []).append(ids[document])
    for cluster in members.values():
        if sum(identity in kept for identity in cluster) != 1:
            raise ValueError(f"datatrove kept not one document of the cluster {cluster}")
        kept = (kept - set(cluster)) | {cluster[0]}
    return kept


def compare_minhash(rows: pa.Table, folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Shares of documents on which two kept sets agree, and whether stages 2 to 4 agree on datatrove's signatures."""
    source, ids = write_jsonl(rows, folder / "minhash.jsonl"), rows["id"].to_pylist()
    theirs, ours, same_stages = {}, {}, []
    for seed in seeds:
        peer("minhash", source, folder / f"minhash-{seed}", str(seed))
        kept = set(json.loads((folder / f"minhash-{seed}" / "kept.json").read_text("utf-8")))
        theirs[seed] = _keep_first(ids, kept, json.loads((folder / f"minhash-{seed}" / "clusters.json").read_text("utf-8")))
        ours[seed] = kept_by_us(rows, seed)
        again = kept_by_our_buckets(ids, folder / f"minhash-{seed}" / "signatures.json")
        same_stages.append(len(ids) - len(theirs[seed] ^ again))

    def agreement(pairs: list[tuple[set[str], set[str]]]) -> float | None:
        return round(statistics.mean(1 - len(a ^ b) / len(ids) for a, b in pairs), 6) if pairs else None

    return {
        "documents": len(ids),
        "kept_by_datatrove": [len(theirs[seed]) for seed in seeds],
        "kept_by_us": [len(ours[seed]) for seed in seeds],
        "ours_with_datatrove": agreement(list(itertools.product(ours.values(), theirs.values()))),
        "datatrove_with_itself": agreement(list(itertools.combinations(theirs.values(), 2))),
        "our_buckets_on_its_signatures": round(min(same_stages) / len(ids), 6),
    }


def compare_shingles(rows: pa.Table, folder: Path) -> dict[str, Any]:
    """How far the shingle sets of a document are the same: datatrove cuts normalised text by spaCy, we by letters and digits."""
    out = folder / "shingles.out"
    peer("shingles", write_jsonl(rows, folder / "shingles.jsonl"), out)
    similar = []
    for line, text in zip(out.read_text("utf-8").split("\n"), rows["text"].to_pylist(), strict=False):
        theirs, ours = set(json.loads(line)["shingles"]), {" ".join(shingle) for shingle in shingles(text)}
        similar.append(len(theirs & ours) / len(theirs | ours) if theirs | ours else 1.0)
    return {
        "documents": len(similar),
        "same_set": round(sum(value == 1 for value in similar) / len(similar), 4),
        "mean_jaccard": round(statistics.mean(similar), 4),
        "lowest_jaccard": round(min(similar), 4),
    }


def near_duplicates(limit: int | None) -> pa.Table:
    """The English documents with labelled near-duplicates: histories of PEPs, copyright files, tldr pages."""
    rows = pq.read_table(DATA / "near_dup" / "docs.parquet", columns=["id", "text", "lang"])
    rows = rows.filter(pc.equal(rows["lang"], "en")).select(["id", "text"])
    return rows.slice(0, limit) if limit else rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/parity.md")
    arguments = measure.arguments("", parser)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        agreements = {}
        for language in ("en", "zh"):
            rows = documents(language, 250 if arguments.quick else None)
            agreements[language] = compare_filters(rows, language, folder)
            figures[language] = {name: one.figures() for name, one in agreements[language].items()}
        chinese = documents("zh", 250 if arguments.quick else None)
        mostly = mostly_han(chinese["text"])
        figures["zh_documents_of_a_tenth_han"] = {
            name: _without(one, set(chinese["id"].filter(pa.array(~mostly)).to_pylist()), int(mostly.sum()))
            for name, one in agreements["zh"].items()
        }
        seeds = SEEDS[:2] if arguments.quick else SEEDS
        figures["minhash"] = compare_minhash(near_duplicates(300 if arguments.quick else None), folder, seeds)
        figures["shingles"] = compare_shingles(documents("en", 60 if arguments.quick else 600), folder)
    text = tables(figures)
    print(text)
    if arguments.write:
        _write(REPORT, text)
    data = "data pack: corpus/en.parquet, corpus/zh.parquet, English documents of near_dup/docs.parquet; datatrove 0.10.1"
    measure.publish("corpus.parity", {}, figures, data=data, quick=arguments.quick)


def mostly_han(texts: pa.ChunkedArray) -> np.ndarray:
    """bool[texts], a tenth of the characters is Han: those texts are cut by jieba throughout."""
    scripts = Analysis.of(texts).scripts
    return scripts[:, 0] * 10 >= np.maximum(scripts.sum(axis=1), 1)


def _without(one: Agreement, left_out: set[str], documents: int) -> dict[str, Any]:
    differ = [each for each in one.differ if each[0] not in left_out]
    unlike = sum((theirs is None) != (ours is None) for _, theirs, ours, _ in differ)
    return {
        "documents": documents,
        "decisions": round(1 - unlike / documents, 6),
        "reasons": round(1 - len(differ) / documents, 6),
    }


def tables(figures: dict[str, Any]) -> str:
    lines = ["| language | filter | documents | same decision | same reason | C4 texts that differ |", "|---|---|---|---|---|---|"]
    for language, name in (("en", "English"), ("zh", "Chinese, FineWeb-2's limits")):
        for one, found in figures[language].items():
            differing = found["texts_that_differ"] if one.startswith("c4") else ""
            lines.append(
                f"| {name} | {one} | {found['documents']} | {found['decisions']:.2%} | {found['reasons']:.2%} | {differing} |"
            )
    for one, found in figures["zh_documents_of_a_tenth_han"].items():
        lines.append(
            f"| Chinese, a tenth Han or more | {one} | {found['documents']} | {found['decisions']:.2%} | {found['reasons']:.2%} | |"
        )
    lines += ["", "Every document on which an English filter disagrees (datatrove's reason, ours, our value):", ""]
    lines += ["| filter | document | datatrove | Danlu | value |", "|---|---|---|---|---|"]
    for one, found in figures["en"].items():
        for identity, theirs, ours, value in found["examples"]:
            shown = "" if value is None else f"{value:.4f}"
            lines.append(f"| {one} | {identity} | {theirs or 'kept'} | {ours or 'kept'} | {shown} |")
    lines += ["", "Classes of disagreement in Chinese (datatrove / Danlu, documents), with an example:", ""]
    lines += ["| filter | class | documents | example |", "|---|---|---|---|"]
    for one, found in figures["zh"].items():
        for kind, count in list(found["classes"].items())[:8]:
            examples = [each[0] for each in found["examples"] if f"{each[1] or 'kept'} / {each[2] or 'kept'}" == kind]
            lines.append(f"| {one} | {kind} | {count} | {examples[0] if examples else ''} |")
    found, cut = figures["minhash"], figures["shingles"]
    lines += [
        "", "| MinHash, 14 bands of 8 | |", "|---|---|",
        f"| documents | {found['documents']} |",
        f"| kept by datatrove, by seed | {', '.join(map(str, found['kept_by_datatrove']))} |",
        f"| kept by Danlu, by seed | {', '.join(map(str, found['kept_by_us']))} |",
        f"| documents on which both agree (mean over seeds) | {found['ours_with_datatrove']:.2%} |",
        f"| documents on which datatrove agrees with itself under another seed | {found['datatrove_with_itself']:.2%} |",
        f"| the same, our buckets and components on datatrove's signatures | {found['our_buckets_on_its_signatures']:.2%} |",
        f"| documents whose shingle sets are equal ({cut['documents']} documents) | {cut['same_set']:.1%} |",
        f"| mean Jaccard similarity of a document's two shingle sets | {cut['mean_jaccard']} |",
    ]  # fmt: skip
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    begin, end = "<!-- tables -->", "<!-- end of tables -->"
    head, rest = path.read_text("utf-8").split(begin)
    path.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", "utf-8")


if __name__ == "__main__":
    main()
