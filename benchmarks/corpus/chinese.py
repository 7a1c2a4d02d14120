"""What the Chinese chain keeps of good text and rejects of bad, with Danlu's limits and with FineWeb-2's as published.

Good: running prose of the data pack (encyclopaedia articles; books), and apart from it poems, technical books and translated
documentation, which hold verse, code and tables. Bad: tests/data/bad_chinese.jsonl (its README tells the making), and the
navigation of the data pack's news pages.

`--write` puts the table into docs/language.md.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks import measure
from operators.chain import Chain
from tests.data import make_bad_chinese

DATA = measure.ROOT.parent / "shared" / "data"
REPORT = measure.ROOT / "docs" / "language.md"
BAD = measure.ROOT / "tests" / "data" / "bad_chinese.jsonl"
PROSE = ("CMRC2018", "DRCD", "zh_classical_modern_target")
KINDS = {
    "CMRC2018": "encyclopaedia, simplified (CMRC2018)",
    "DRCD": "encyclopaedia, traditional (DRCD)",
    "zh_classical_modern_target": "books (modern translations of the classics)",
    "zh_poetry": "poems",
    "zh_javaguide": "technical book with code (JavaGuide)",
    "zh_advjava": "technical book with code (advanced-java)",
}


def chain(preset: str) -> Chain:
    return Chain(
        [
            {"detect_language": {"keep": ["zh"]}},
            "gopher_repetition",
            {"gopher_quality": {"preset": preset}},
            {"c4_quality": {"languages": ["en"]}},
            {"fineweb_quality": {"preset": preset}},
        ]
    )


def kept(texts: list[str], preset: str) -> tuple[int, dict[str, int]]:
    rows = pa.table(
        {"id": list(map(str, range(len(texts)))), "text": pa.array(texts, pa.large_string()), "source": [""] * len(texts)}
    )
    result = chain(preset).run(rows)
    return result.kept.num_rows, dict(result.rejected.most_common(4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/language.md")
    arguments = measure.arguments("", parser)
    good = pq.read_table(DATA / "corpus" / "zh.parquet", columns=["text", "source"])
    sources = pc.list_element(pc.split_pattern(good["source"], " "), 0)
    bad = [json.loads(line) for line in BAD.read_text("utf-8").split("\n") if line]
    sets: dict[str, list[str]] = {
        name: good.filter(pc.equal(sources, source))["text"].to_pylist() for source, name in KINDS.items()
    }
    sets["good: prose"] = good.filter(pc.is_in(sources, pa.array(PROSE)))["text"].to_pylist()
    bad += [{**row, "kind": f"{row['kind']} of news pages"} for row in make_bad_chinese.from_pages()]
    for kind in dict.fromkeys(row["kind"] for row in bad):
        sets[f"bad: {kind}"] = [row["text"] for row in bad if row["kind"] == kind]
    sets["bad: all"] = [row["text"] for row in bad]
    figures: dict[str, Any] = {}
    lines = ["| text | documents | kept | kept with `preset: fineweb2` | rejected for, most often |", "|---|---|---|---|---|"]
    for name, texts in sets.items():
        texts = texts[:: 5 if arguments.quick else 1]
        (ours, reasons), (published, _) = kept(texts, "danlu"), kept(texts, "fineweb2")
        figures[name] = {"documents": len(texts), "kept": ours / len(texts), "kept_fineweb2": published / len(texts)}
        shown = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        lines.append(f"| {name} | {len(texts)} | {ours / len(texts):.1%} | {published / len(texts):.1%} | {shown} |")
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        begin, end = "<!-- chinese -->", "<!-- end of chinese -->"
        head, rest = REPORT.read_text("utf-8").split(begin)
        REPORT.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", "utf-8")
    data = "data pack: corpus/zh.parquet; tests/data/bad_chinese.jsonl; html/web"
    measure.publish("corpus.chinese", {}, figures, data=data, quick=arguments.quick)


if __name__ == "__main__":
    main()
