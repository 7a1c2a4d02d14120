"""A small run of every kind of stage, written with the real shard writer, full of text that a page must survive.

`python -m tests.pipelines.report.fixture_run DIRECTORY` writes it for a look at the report.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster import storage
from operators import shards, tables
from operators.ledger import Equation, Ledger

SCRIPT = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
NASTY = {
    "script": f"A page about forms. {SCRIPT} </div></section></body> &amp; &lt;b&gt; \"quoted\" 'single'",
    "control": "NUL \x00 bell \x07 escape \x1b[31mred\x1b[0m delete \x7f and a form feed \x0c in one line",
    "rtl": "An override \u202egnirts siht\u202c hides its direction; שלום עולם and مرحبا بالعالم stand beside English.",
    "emoji": "Family 👨‍👩‍👧‍👦, flag 🇨🇳, zero\u200bwidth, soft\u00adhyphen, noncharacter \ufffe, replaced \ufffd.",
    "long": "x" * 3000 + " https://example.org/" + "a-very-long-path/" * 120,
    "zh": "丹炉把原始网页文本变成训练好、对齐过、评测过的语言模型。每一行都有去向，每一步都可以重来。" * 30,
    "lines": "\n".join(f"menu item {n}" for n in range(400)),
}
ENGLISH = (
    "The harbour was built in the second century to shelter grain ships on their way to the capital. Its two moles enclosed "
    "about seventy hectares of water, and a lighthouse stood on an artificial island between them. Silt closed the western "
    "entrance within three hundred years."
)
CHINESE = (
    "运河开凿于公元六世纪，连接南北两大水系，全长一千七百余公里。沿线设有粮仓与驿站，"
    "每年春季疏浚河道，秋季漕船北上。到了宋代，河道改走东线，旧城随之衰落，而新的码头市镇逐渐兴起。"
)

RECIPE = """name: quickstart
seed: 17
stages:
  web:
    kind: corpus
    read: {format: warc, path: examples/data/pages.warc.gz}
    operators:
      - extract_html
      - fix_text
      - detect_language: {keep: [en, zh]}
      - gopher_repetition
      - gopher_quality
      - redact_pii: {}
  docs: {kind: corpus, read: {format: parquet, path: docs.parquet}, operators: [fix_text, score_quality: {minimum: 0.3}]}
  clean: {kind: dedup, input: [web, docs], threshold: 0.8}
  bpe: {kind: tokenizer, input: clean, vocab_size: 8000}
  tokens: {kind: pack, input: clean, tokenizer: bpe, length: 1024}
  # 预训练一个小模型 </pre><script>alert(1)</script>
  base: {kind: pretrain, input: tokens, model: {layers: 4, hidden: 256}}
"""

ORDER: list[tuple[str, str, list[str], float]] = [
    ("judge", "quality_classifier", [], 4.1),
    ("web", "corpus", [], 21.4),
    ("docs", "corpus", ["judge"], 9.8),
    ("clean", "dedup", ["web", "docs"], 6.1),
    ("bpe", "tokenizer", ["clean"], 3.3),
    ("tokens", "pack", ["clean", "bpe"], 4.7),
    ("base", "pretrain", ["tokens", "bpe"], 141.0),
    ("tasks", "self_instruct", [], 188.2),
    ("evolved", "evol_instruct", ["tasks"], 96.5),
    ("pairs", "preferences", ["tasks"], 71.9),
    ("chat", "sft", ["base", "evolved", "tasks"], 64.3),
    ("wide", "sft", ["base", "tasks"], 58.0),
    ("aligned", "dpo", ["chat", "pairs"], 49.6),
    ("scores", "evaluate", ["base", "chat", "aligned", "pairs", "tokens"], 37.7),
]


def build_run(root: Path, name: str = "quickstart") -> Path:
    """Write the run below `root` and return its directory. The same bytes every time, timings apart."""
    run = root / name
    writer = _Writer(run)
    _judge(writer)
    _web(writer)
    _docs(writer)
    _clean(writer)
    _tokens(writer)
    _synthesis(writer)
    _pairs(writer)
    _training(writer)
    _scores(writer)
    record = {
        "recipe": name,
        "recipe_text": RECIPE,
        "order": [stage for stage, *_ in ORDER],
        "stages": {
            stage: {
                "kind": kind,
                "directory": f"{stage}/{_fingerprint(stage)}",
                "inputs": inputs,
                "status": "done",
                "seconds": seconds,
                "reused": stage == "docs",
            }
            for stage, kind, inputs, seconds in ORDER
        },
        "started": "2026-03-01T09:12:44.120000+00:00",
        "seconds": 612.4,
        "machine": {
            "cpus": 2,
            "memory_bytes": 24 << 30,
            "gpus": [],
            "python": "3.11.2",
            "platform": "Linux-6.1.0-28-amd64-x86_64-with-glibc2.36",
        },
        "command": "danlu run examples/quickstart.yaml",
        "message": None,
    }
    write_record(run, record)
    return run


def read_record(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text("utf-8")))


def write_record(run: Path, record: dict[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps(record, ensure_ascii=False), "utf-8")


def _fingerprint(stage: str) -> str:
    return tables.stable_id("fixture", stage)[:16]


class _Writer:
    """Writes stages of the run, one unit each unless told otherwise."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def directory(self, stage: str) -> str:
        return str(self.run / stage / _fingerprint(stage))

    def finish(self, stage: str, **options: Any) -> None:
        kind, inputs = next((kind, inputs) for name, kind, inputs, _ in ORDER if name == stage)
        config = {"kind": kind, **options.pop("config", {})}
        shards.finish(
            self.directory(stage), stage=stage, kind=kind, fingerprint=_fingerprint(stage), config=config,
            inputs={name: f"{name}/{_fingerprint(name)}" for name in inputs}, **options,
        )  # fmt: skip

    def unit(
        self, stage: str, number: int, rows: pa.Table | None, rejects: list[dict[str, Any]], ledger: Ledger, stats: dict[str, Any]
    ) -> None:
        writer = shards.UnitWriter(self.directory(stage), number)
        if rows is not None:
            writer.write(rows)
        if rejects:
            writer.reject(tables.rejects_table(rejects))
        writer.commit(ledger, stats)


def _documents(stage: str, count: int) -> pa.Table:
    texts = [(ENGLISH if n % 3 else CHINESE) + f" {n}" for n in range(count)]
    return pa.table(
        {
            "id": pa.array([f"{stage}-{n:05d}" for n in range(count)]),
            "text": pa.array(texts, pa.large_string()),
            "source": pa.array([stage] * count),
            "url": pa.nulls(count, pa.string()),
            "lang": pa.array(["en" if n % 3 else "zh" for n in range(count)]),
        }
    )


def _funnel(rows_in: int, steps: list[tuple[str, dict[str, int]]]) -> tuple[dict[str, Any], dict[str, int], int]:
    funnel: dict[str, Any] = {}
    rejected: dict[str, int] = {}
    left = rows_in
    for index, (name, reasons) in enumerate(steps):
        removed = sum(reasons.values())
        funnel[f"{index:02d}:{name}"] = {"in": left, "kept": left - removed, "rejected": reasons}
        left -= removed
        for reason, count in reasons.items():
            rejected[f"{name}:{reason}"] = rejected.get(f"{name}:{reason}", 0) + count
    return funnel, rejected, left


def _judge(writer: _Writer) -> None:
    writer.finish(
        "judge",
        ledger=Ledger(812, 0, 809, _counter({"quality_classifier:empty": 2}), 1),
        stats={
            "documents": {"good": 403, "bad": 406},
            "attempts": 1,
            "held_out": 81,
            "accuracy": 0.962963,
            "accuracy_by_language": {"en": 0.974359, "zh": 0.952381},
            "held_out_by_language": {"en": 39, "zh": 42},
        },
        files={"model": "model.bin"},
    )


def _web(writer: _Writer) -> None:
    steps = [
        ("extract_html", {"empty": 41, "not_html": 12}),
        ("fix_text", {}),
        ("detect_language", {"other_language": 118, "low_score": 33}),
        (
            "gopher_repetition",
            {"duplicate_lines": 64, "top_2_gram": 9, "duplicate_paragraphs": 22, "dup_10_gram": 3, "top_4_gram": 2},
        ),
        ("gopher_quality", {"too_few_words": 71, "too_long": 1, "few_stop_words": 18}),
        ("redact_pii", {}),
    ]
    funnel, rejected, kept = _funnel(1240, steps)
    texts = {
        "extract_html:empty": "",
        "extract_html:not_html": NASTY["control"],
        "detect_language:other_language": NASTY["rtl"],
        "detect_language:low_score": NASTY["emoji"],
        "gopher_repetition:duplicate_lines": NASTY["lines"],
        "gopher_repetition:duplicate_paragraphs": NASTY["zh"],
        "gopher_quality:too_few_words": NASTY["script"],
        "gopher_quality:too_long": NASTY["long"],
    }
    rejects: list[dict[str, Any]] = []
    for key, count in sorted(rejected.items()):
        operator, _, reason = key.partition(":")
        for n in range(count):
            text = texts.get(key, f"Removed by {key}, number {n}.") + (f" ({n})" if n and key != "extract_html:empty" else "")
            value = round(0.31 + 0.01 * (n % 40), 4) if operator.startswith("gopher") else None
            rejects.append(
                {
                    "id": f"web-r{len(rejects):05d}",
                    "text": text,
                    "source": "web",
                    "operator": operator,
                    "reason": reason,
                    "value": value,
                }
            )
    for n in range(4):
        rejects.append(
            {
                "id": f"web-q{n}",
                "text": None,
                "source": "pages.warc.gz",
                "operator": "warc",
                "reason": "broken_record",
                "detail": f"pages.warc.gz, record {700 + n}: content length {SCRIPT[:9]} is no number",
                "quarantined": True,
            }
        )
    sites = {f"site-{n:02d}.example": 520 // (n * n + 1) + 1 for n in range(2, 20)}
    stats = {
        "funnel": funnel,
        "languages": {"en": 611, "zh": 235},
        "sources": {"libreoffice-help": 520, "python-docs": 260, **sites},
        "lengths": {
            "en": {f"2^{k}": int(230 * math.exp(-((k - 11) ** 2) / 5)) for k in range(6, 18)},
            "zh": {f"2^{k}": int(96 * math.exp(-((k - 9.5) ** 2) / 4)) for k in range(5, 16)},
        },
    }  # fmt: skip
    writer.unit("web", 0, _documents("web", kept), rejects, Ledger(1244, 0, kept, _counter(rejected), 4), stats)
    writer.finish("web", timings={"seconds": 21.4, "reader_seconds": 3.2})


def _docs(writer: _Writer) -> None:
    funnel, rejected, kept = _funnel(900, [("fix_text", {}), ("score_quality", {"low_quality": 77})])
    rejects = [
        {"id": f"docs-r{n:04d}", "text": f"点击这里 免费领取 {n} buy now!!!", "source": "docs", "operator": "score_quality",
         "reason": "low_quality", "value": 0.002 * n} for n in range(77)
    ]  # fmt: skip
    stats = {
        "funnel": funnel,
        "languages": {"zh": 501, "en": 320, "": 2},
        "sources": {"wikipedia-zh": 501, "wikipedia-en": 320, SCRIPT: 2},
        "lengths": {"zh": {"2^8": 40, "2^9": 210, "2^10": 180, "2^11": 71}, "en": {"2^9": 60, "2^10": 160, "2^11": 100}},
        "quality": {"0.3": 40, "0.4": 61, "0.5": 93, "0.6": 122, "0.7": 190, "0.8": 205, "0.9": 112},
    }
    writer.unit("docs", 0, _documents("docs", kept), rejects, Ledger(900, 0, kept, _counter(rejected), 0), stats)
    writer.finish("docs", timings={"seconds": 9.8})


def _counter(counts: dict[str, int]) -> Any:
    from collections import Counter

    return Counter(counts)


def _clean(writer: _Writer) -> None:
    import numpy as np

    directory, view, removed_total = writer.directory("clean"), [], 0
    for index, part in enumerate(shards.parts([writer.directory("web"), writer.directory("docs")])):
        removed = np.zeros(part.rows, bool)
        removed[5::7] = True
        removed_total += int(removed.sum())
        view.append(
            {
                "path": shards.relative_to_run(directory, part.path),
                "rows": part.rows,
                "removed": shards.save_bitmap(directory, index, removed),
                "removed_rows": int(removed.sum()),
            }
        )
    total = sum(item["rows"] for item in view)
    near = removed_total - 31
    english = ENGLISH + " " + ENGLISH.replace("harbour", "port")
    chinese = CHINESE * 3
    stats = {
        "documents": total,
        "duplicate_ids": 2,
        "exact": {"removed": 31},
        "minhash": {
            "removed": near,
            "clusters": {"2": 96, "3": 21, "4": 9, "5": 4, "8": 2, "17": 1},
            "edges": 214,
            "pairs": {"checked": 688, "unchecked": 0},
        },
        "examples": [
            {
                "kept": "web-00012",
                "kept_text": english,
                "removed": "web-00410",
                "removed_text": english.replace("second century", "third century")
                .replace("Silt", f"Sand {SCRIPT}")
                .replace("water", "sea water"),
                "similarity": 0.9141,
            },
            {
                "kept": "docs-00003",
                "kept_text": chinese,
                "removed": "docs-00301",
                "removed_text": chinese.replace("公元六世纪", "公元七世纪").replace("秋季", "每年秋季", 1),
                "similarity": 0.8867,
            },
        ],
    }
    writer.finish(
        "clean",
        ledger=Ledger(total, 0, total - removed_total, _counter({"exact:duplicate": 31, "minhash:near_duplicate": near})),
        stats=stats,
        view=view,
    )


def _tokens(writer: _Writer) -> None:
    clean = shards.load_manifest(writer.directory("clean")).rows
    storage.write_bytes(storage.join(writer.directory("bpe"), "tokenizer.json"), b"{}")
    writer.finish(
        "bpe",
        ledger=Ledger(clean, 0, clean),
        stats={"vocab_size": 8000, "documents": clean, "bytes": 3_412_905, "tokens_per_character": {"en": 0.2714, "zh": 0.8102}},
        files={"tokenizer": "tokenizer.json"},
    )
    sequences, length, padding, aside = 1187, 1024, 731, 3
    tokens = sequences * length - padding
    writer.finish(
        "tokens",
        ledger=Ledger(clean, 0, clean - aside, _counter({"pack:empty": aside})),
        equations=[
            Equation("documents", {"in": clean}, {"packed": clean - aside, "set aside": aside}),
            Equation("tokens", {"in": tokens + 512}, {"packed": tokens, "cut": 512}),
        ],
        stats={
            "documents": clean,
            "packed": clean - aside,
            "set_aside": {"empty": aside},
            "sequences": sequences,
            "tokens": tokens,
            "tokens_cut": 512,
            "padding_tokens": padding,
            "languages": {"en": tokens - 400_000, "zh": 400_000},
            "sources": {"wikipedia-zh": 380_000, "wikipedia-en": 390_000, "libreoffice-help": tokens - 770_000},
        },
    )


def _conversation(
    identity: str, lang: str, user: str, reply: str, operation: str, number: int, parents: list[str]
) -> dict[str, Any]:
    return {
        "id": identity,
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}],
        "lang": lang,
        "tools": None,
        "provenance": {
            "generator": "SmolLM2-135M-Instruct",
            "revision": "9f2c41d0",
            "template": "a81b3c",
            "sampling": '{"temperature": 0.9}',
            "seed": 17_000 + number,
            "parents": parents,
            "operation": operation,
            "round": number % 2,
        },
    }


def _synthesis(writer: _Writer) -> None:
    tasks = [
        _conversation(
            "t-0001", "en", f"Explain what {SCRIPT} does in a browser.", NASTY["script"], "self_instruct", 1, ["seed-3", "seed-9"]
        ),
        _conversation("t-0002", "zh", "用三句话解释什么是大运河。", CHINESE, "self_instruct", 2, ["seed-zh-4"]),
        _conversation("t-0003", "en", "List two emoji.", NASTY["emoji"], "self_instruct", 3, []),
    ]
    tasks += [
        _conversation(
            f"t-{n:04d}", "en", f"Write a title for chapter {n}.", f"Chapter {n}: the harbour", "self_instruct", n, ["t-0001"]
        )
        for n in range(4, 65)
    ]
    rejected = {"novelty:too_similar": 52, "parse:no_instruction": 19, "filter:too_short": 7}
    rejects = [
        {
            "id": f"t-r{key}-{n}",
            "text": json.dumps({"instruction": f"Write {n} {SCRIPT}"}),
            "source": "tasks",
            "operator": key.split(":")[0],
            "reason": key.split(":")[1],
            "value": 0.71 if key.startswith("novelty") else None,
        }
        for key, count in rejected.items()
        for n in range(count)
    ]
    writer.unit(
        "tasks", 0, pa.Table.from_pylist(tasks, schema=tables.CONVERSATIONS), rejects, Ledger(0, 142, 64, _counter(rejected)), {}
    )
    writer.finish(
        "tasks",
        stats={
            "calls": 301,
            "prompt_tokens": 181_022,
            "completion_tokens": 40_127,
            "rounds": {"0": {"asked": 80, "kept": 41}, "1": {"asked": 62, "kept": 23}},
            "novelty": {f"{n / 10:.1f}": value for n, value in enumerate([2, 9, 22, 31, 18, 9, 7, 21, 14, 9])},
            "languages": {"en": 63, "zh": 1},
            "operations": {"self_instruct": 64},
        },
        timings={
            "seconds": 188.2,
            "generation_seconds": 170.5,
            "cache_hits": 12,
            "drawn_calls": 289,
            "drawn_prompt_tokens": 175_000,
            "drawn_completion_tokens": 38_600,
            "prefix_tokens": 61_250,
            "cost": 0.1234,
            "cost_drawn": 0.119,
            "currency": "USD",
        },
    )
    evolved = [
        _conversation(
            f"e-{n:04d}",
            "zh" if n % 9 == 0 else "en",
            f"Rewrite t-{n:04d} with one more constraint.",
            ENGLISH,
            f"evol:{kind}",
            n,
            [f"t-{n:04d}"],
        )
        for n, kind in ((n, ("deepen", "concretise", "reason", "broaden")[n % 4]) for n in range(1, 49))
    ]
    writer.unit(
        "evolved",
        0,
        pa.Table.from_pylist(evolved, schema=tables.CONVERSATIONS),
        [],
        Ledger(64, 32, 48, _counter({"elimination:copies_prompt": 30, "elimination:no_gain": 18})),
        {},
    )
    writer.finish(
        "evolved",
        stats={
            "calls": 96,
            "prompt_tokens": 70_100,
            "completion_tokens": 25_400,
            "rounds": {"0": {"asked": 96, "kept": 48}},
            "languages": {"en": 43, "zh": 5},
            "operations": {"evol:deepen": 12, "evol:concretise": 12, "evol:reason": 12, "evol:broaden": 12},
        },
        timings={"seconds": 96.5},
    )


def _pairs(writer: _Writer) -> None:
    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    rows = [
        {
            "id": f"p-{n:03d}",
            "prompt": turn("user", "大运河有多长？" if n % 5 == 0 else f"How long is the canal? ({n})"),
            "chosen": turn("assistant", CHINESE if n % 5 == 0 else ENGLISH),
            "rejected": turn("assistant", SCRIPT if n == 1 else "I do not know. " * (n % 4 + 1)),
            "margin": 0.1 + 0.02 * n,
            "lang": "zh" if n % 5 == 0 else "en",
            "provenance": None,
        }
        for n in range(30)
    ]
    writer.unit(
        "pairs",
        0,
        pa.Table.from_pylist(rows, schema=tables.PREFERENCES),
        [],
        Ledger(64, 0, 30, _counter({"margin:too_small": 30, "sample:identical": 4})),
        {},
    )
    writer.finish(
        "pairs", stats={"margins": {"0.1": 5, "0.2": 5, "0.3": 5, "0.4": 5, "0.5": 5, "0.6": 5}, "pairs": 30, "calls": 256}
    )


def _training(writer: _Writer) -> None:
    draw = random.Random(7)

    def curve(steps: int, start: float, end: float, rate: float, every: int, more: bool = False) -> list[dict[str, Any]]:
        points = []
        for step in range(every, steps + 1, every):
            done = step / steps
            point: dict[str, Any] = {
                "step": step,
                "loss": round(end + (start - end) * math.exp(-4.2 * done) + draw.uniform(-0.05, 0.05) * start / 4, 4),
                "learning_rate": rate
                * (step / (0.1 * steps) if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))),
                "tokens": step * 8192,
            }
            if more:
                point["rewards_accuracy"] = round(0.5 + 0.35 * done + draw.uniform(-0.03, 0.03), 4)
                point["rewards_margin"] = round(0.9 * done + draw.uniform(-0.05, 0.05), 4)
            points.append(point)
        return points

    ledger = Ledger()
    for stage, points, parameters, trainable, samples, speed in (
        ("base", curve(300, 9.02, 5.31, 3e-3, 1), 7_341_312, 7_341_312, 2400, 17_420.0),
        ("chat", curve(80, 4.9, 3.1, 2e-4, 2), 7_341_312, 221_184, 640, 6_011.5),
        ("wide", curve(120, 4.8, 3.3, 1e-4, 2), 7_341_312, 442_368, 960, 5_870.2),
        ("aligned", curve(40, 0.693, 0.512, 5e-6, 1, more=True), 7_341_312, 221_184, 160, 3_100.9),
    ):
        writer.finish(
            stage,
            ledger=ledger,
            stats={
                "curve": points,
                "parameters": parameters,
                "trainable_parameters": trainable,
                "steps": points[-1]["step"],
                "tokens": points[-1]["tokens"],
                "samples": samples,
                "mixture": {"evolved": {"samples": samples - 64, "tokens": 9000}, "tasks": {"samples": 64, "tokens": 900}},
                "set_aside": {"too_long": 2} if stage == "chat" else {},
            },
            files={"model": "model"},
            timings={
                "seconds": next(s for n, _, _, s in ORDER if n == stage),
                "tokens_per_second": speed,
                "curve": [{"step": point["step"], "tokens_per_second": speed + point["step"]} for point in points],
            },
        )


def _scores(writer: _Writer) -> None:
    held_out = [
        ("*", "*", 105, 47_881, 228.4),
        ("en", "*", 65, 27_340, 141.8),
        ("en", "wikipedia-en", 40, 18_220, 181.2),
        ("en", "libreoffice-help", 25, 9_120, 92.47),
        ("zh", "wikipedia-zh", 40, 20_541, 402.9),
    ]
    factors = {"base": (1, 1, 1, 1, 1), "chat": (1.08, 1.01, 1.034, 0.967, 1.21), "aligned": (1.2, 1.0, 1.06, 0.94, 1.55)}
    writer.finish(
        "scores",
        config={"models": ["base", "chat", "aligned"]},
        stats={
            "perplexity": [
                {
                    "model": model,
                    "lang": lang,
                    "source": source,
                    "documents": documents,
                    "tokens": tokens,
                    "perplexity": round(value * factor, 3),
                }
                for model, ratios in factors.items()
                for (lang, source, documents, tokens, value), factor in zip(held_out, ratios, strict=True)
            ],
            "preference_accuracy": {"base": 0.4667, "chat": 0.5333, "aligned": 0.7333},
            "preference_accuracy_vs_reference": {"chat": 0.6, "aligned": 0.8333},
            "preference_pairs": 30,
            "samples": [
                {"prompt": "What is a canal?", "lang": "en", "replies": {"base": SCRIPT, "chat": ENGLISH, "aligned": ENGLISH[:90]}},
                {
                    "prompt": "请介绍一下大运河。",
                    "lang": "zh",
                    "replies": {"base": NASTY["control"], "chat": CHINESE, "aligned": CHINESE[:40]},
                },
            ],
        },
    )


if __name__ == "__main__":
    from pipelines.report.build import build_report

    print(build_report(str(build_run(Path(sys.argv[1])))))
