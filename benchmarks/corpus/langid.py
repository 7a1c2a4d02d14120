"""Language identification on labelled text: F1 by language, Chinese scripts, shares of mixed documents.

Sentences and short command descriptions of the data pack (langid/sentences.jsonl, langid/short_tech.jsonl), each judged by
`detect_language` and, where it says Chinese, by `chinese_script`. Mixed documents are composed here of paragraphs of the
corpus in two languages, shuffled; the error is the greatest difference between a language's share and its true share.

`--write` puts the tables into docs/language.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks import measure
from operators.text.chinese_script import ChineseScript
from operators.text.language import DetectLanguage
from operators.text.language_share import LanguageShare

DATA = measure.ROOT.parent / "shared" / "data"
REPORT = measure.ROOT / "docs" / "language.md"
_SAME = {"no": "nb"}  # the model's name of what the labels call otherwise
WINDOWS = (50, 100, 150, 300)
PAIRS = (("en", "zh"), ("en", "de"), ("fr", "de"), ("zh", "de"), ("en", "zh"))
MIXED = 200
LANGUAGES = ("en", "zh", "de", "fr")


def identify(texts: list[str]) -> list[str]:
    """The language of each, zh-Hans or zh-Hant where a character tells."""
    rows = pa.table({"text": pa.array(texts, pa.large_string())})
    scores = DetectLanguage().measure(rows)
    rows = ChineseScript(codes=True).process(rows.append_column("lang", scores["lang"])).table
    return [_SAME.get(code, code) for code in rows["lang"].to_pylist()]


def f1_by_language(truth: list[str], found: list[str]) -> dict[str, tuple[int, float, str]]:
    """{language: (rows, F1, what it is taken for most often)}."""
    right = Counter(a for a, b in zip(truth, found, strict=True) if a == b)
    said, true = Counter(found), Counter(truth)
    wrong: dict[str, Counter[str]] = {code: Counter() for code in true}
    for a, b in zip(truth, found, strict=True):
        if a != b:
            wrong[a][b] += 1
    out = {}
    for code, count in sorted(true.items()):
        often = ", ".join(f"{other} {times}" for other, times in wrong[code].most_common(2))
        out[code] = (count, 2 * right[code] / max(count + said[code], 1), often)
    return out


def scripts_of_documents() -> dict[str, tuple[int, float]]:
    """{source and label: (documents that have a telling character, share told right)}."""
    rows = pq.read_table(DATA / "corpus" / "zh.parquet", columns=["text", "source", "lang"])
    told = (
        ChineseScript().measure(rows.select(["text"]).append_column("lang", pa.array(["zh"] * rows.num_rows)))["script"].to_pylist()
    )
    sources = [name.split(" ")[0] for name in rows["source"].to_pylist()]
    found: dict[str, list[bool]] = {}
    for source, label, script in zip(sources, rows["lang"].to_pylist(), told, strict=True):
        if script is not None:
            found.setdefault(f"{source} {label}", []).append(label.endswith(script))
    return {name: (len(right), float(np.mean(right))) for name, right in sorted(found.items())}


def language_prose(code: str) -> list[str]:
    """Documents of one language: C4 pages, encyclopaedia articles, documentation."""
    if code in ("en", "zh"):
        rows = pq.read_table(DATA / "corpus" / f"{code}.parquet", columns=["text", "source"])
        return rows.filter(pc.match_substring_regex(rows["source"], "^(c4_demo|CMRC2018|DRCD)"))["text"].to_pylist()
    rows = pq.read_table(DATA / "corpus" / "other.parquet", columns=["text", "lang"])
    return rows.filter(pc.equal(rows["lang"], code))["text"].to_pylist()


def mixed_documents(draw: np.random.Generator) -> tuple[list[str], list[dict[str, float]]]:
    """Documents of paragraphs in two languages and the true share of each, by characters that are no white space."""
    paragraphs = {
        code: [line.strip() for text in language_prose(code) for line in text.split("\n") if 150 <= len(line.strip()) <= 900]
        for code in LANGUAGES
    }
    documents, shares = [], []
    for number in range(MIXED):
        sizes: Counter[str] = Counter()
        pieces: list[str] = []
        for code in PAIRS[number % len(PAIRS)]:
            for _ in range(int(draw.integers(1, 9))):
                piece = paragraphs[code][int(draw.integers(len(paragraphs[code])))]
                pieces.append(piece)
                sizes[code] += len("".join(piece.split()))
        draw.shuffle(pieces)
        documents.append("\n".join(pieces))
        shares.append({code: size / sum(sizes.values()) for code, size in sizes.items()})
    return documents, shares


def share_errors(documents: list[str], shares: list[dict[str, float]], window: int) -> np.ndarray:
    found = LanguageShare(window=window).measure(pa.table({"text": pa.array(documents, pa.large_string())}))["lang_shares"]
    errors = []
    for row, true in zip(found.to_pylist(), shares, strict=True):
        have = {item["lang"]: item["share"] for item in row}
        errors.append(max(abs(have.get(code, 0.0) - share) for code, share in true.items()))
    return np.array(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/language.md")
    arguments = measure.arguments("", parser)
    sets: dict[str, dict[str, tuple[int, float, str]]] = {}
    figures: dict[str, Any] = {}
    known = _labels()
    for name in ("sentences", "short_tech"):
        rows = [json.loads(line) for line in (DATA / "langid" / f"{name}.jsonl").read_text("utf-8").split("\n") if line]
        rows = rows[:: 10 if arguments.quick else 1]
        truth, found = [row["lang"] for row in rows], identify([row["text"] for row in rows])
        # rows of languages that the model does not know would count against those that they are taken for
        fair = [place for place, code in enumerate(truth) if code in known]
        sets[name] = {
            **f1_by_language(truth, found),
            **f1_by_language([truth[place] for place in fair], [found[place] for place in fair]),
        }
        have = {code: f1 for code, (_, f1, _) in sets[name].items() if code in known}
        figures[name] = {
            "rows": len(rows),
            "languages": len(have),
            "macro_f1": float(np.mean(list(have.values()))),
            "f1": {code: round(f1, 4) for code, (_, f1, _) in sets[name].items()},
            "not_in_the_model": sorted(set(sets[name]) - known),
        }
    scripts = scripts_of_documents()
    figures["script_of_documents"] = {name: [count, round(share, 4)] for name, (count, share) in scripts.items()}
    documents, shares = mixed_documents(np.random.default_rng(17))
    pure = [language_prose(code)[:100] for code in LANGUAGES]
    mixed = {window: share_errors(documents, shares, window) for window in WINDOWS}
    figures["mixed_documents"] = {
        str(window): {
            "mean_error": float(errors.mean()),
            "error_90th": float(np.quantile(errors, 0.9)),
            "error_of_one_language": float(
                np.mean(
                    [
                        share_errors(texts, [{code: 1.0}] * len(texts), window).mean()
                        for code, texts in zip(LANGUAGES, pure, strict=True)
                    ]
                )
            ),
        }
        for window, errors in mixed.items()
    }
    text = tables(sets, figures, scripts)
    print(text)
    if arguments.write:
        begin, end = "<!-- tables -->", "<!-- end of tables -->"
        head, rest = REPORT.read_text("utf-8").split(begin)
        REPORT.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", "utf-8")
    data = (
        "data pack: langid/sentences.jsonl, langid/short_tech.jsonl, corpus/zh.parquet; 200 mixed documents composed of the corpus"
    )
    measure.publish("corpus.langid", {}, figures, data=data, quick=arguments.quick)


def _labels() -> set[str]:
    """The languages that the model knows, by the names of the labels."""
    from operators.text import fasttext_model

    labels = fasttext_model.load(fasttext_model.packaged_language_model()).get_labels()
    names = {label.removeprefix(fasttext_model.LABEL) for label in labels}
    return {_SAME.get(name, name) for name in names - {"zh"}} | {"zh-Hans", "zh-Hant"}


def tables(
    sets: dict[str, dict[str, tuple[int, float, str]]], figures: dict[str, Any], scripts: dict[str, tuple[int, float]]
) -> str:
    lines = ["| data | rows | languages | macro-F1 |", "|---|---|---|---|"]
    for name in sets:
        found = figures[name]
        lines.append(f"| {name} | {found['rows']} | {found['languages']} | {found['macro_f1']:.3f} |")
    lines += ["", "F1 by language; in brackets the rows, then what the others are taken for most often.", ""]
    lines += ["| language | sentences | | short_tech | |", "|---|---|---|---|---|"]
    for code in sorted({code for found in sets.values() for code in found}):
        cells = []
        for found in sets.values():
            count, f1, often = found.get(code, (0, 0.0, ""))
            cells += [f"{f1:.3f} ({count})" if count else "", often]
        lines.append(f"| {code} | {' | '.join(cells)} |")
    lines += ["", "| documents of data/corpus/zh.parquet | with a telling character | script told right |", "|---|---|---|"]
    lines += [f"| {name} | {count} | {share:.1%} |" for name, (count, share) in scripts.items()]
    lines += [
        "",
        f"| {MIXED} mixed documents: characters of a window | mean error | nine tenths below | documents of one language |",
        "|---|---|---|---|",
    ]
    for window, found in figures["mixed_documents"].items():
        errors = (found["mean_error"], found["error_90th"], found["error_of_one_language"])
        lines.append(f"| {window} | {' | '.join(f'{error:.3f}' for error in errors)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
