"""The contract of filters: decisions are a function of stored scores and named columns alone, for every registered filter."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators import registry, shards, tables
from operators.chain import Chain
from operators.ledger import Ledger
from operators.measures import KEPT, replayable, segments
from operators.operator import Filter
from operators.quality.classifier import train_classifier
from tests.operators.filters.arpa import ARPA

ENGLISH = "The committee met on Tuesday to discuss the new library, and most of its members agreed with the plan that they have. "
CHINESE = "今天下午，委员会讨论了新图书馆的建设方案，大多数成员都同意这个计划，并决定明年春天开始施工。"
TEXTS = [
    ENGLISH * 4, CHINESE * 5, "short", "- Home\n- About\n" * 30, "", "点击购买" * 60, "Der Ausschuss tagte. " * 9, "\x00\n \t",
    "fuck " * 20 + ENGLISH, f"{ENGLISH}\n{CHINESE}", "The cat sat. " * 50,
]  # fmt: skip
URLS = [None, "", *(f"https://sexy-{n}.example/新闻/{n}" for n in range(len(TEXTS) - 2))]
LANGS = ["en", "zh-Hans", None, "en", "en", "zh", "de", None, "en", "zh", "en"]


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Recipe entries of the registered filters: those that need options get some, most get a stricter form as well."""
    directory = tmp_path_factory.mktemp("filters")
    model = str(directory / "model.bin")
    train_classifier([ENGLISH, CHINESE] * 20, [f"买 {n} $$$" for n in range(40)], model)
    (directory / "tiny.arpa").write_text(ARPA, encoding="utf-8")
    items = [{"id": "1", "question": "The committee met on Tuesday to discuss the new library"}]
    (directory / "items.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    benchmarks = [{"name": "made", "path": str(directory / "items.jsonl"), "fields": ["question"]}]
    return {
        "detect_language": [{"keep": ["en", "zh"]}],
        "language_share": [{"languages": ["en", "zh"], "minimum": 0.7}],
        "chinese_script": [{"keep": ["Hans"], "min_modern_particles": 0.01}],
        "filter_urls": [{"missing": "drop", "soft_words": 1}],
        "gopher_quality": [{"thresholds": {"zh": {"min_words": 90}}}],
        "score_quality": [{"model": model, "minimum": {"en": 0.5, "*": 0.3}}],
        "bad_words": [{"max_count": 0}],
        "filter_lengths": [{"min_words": 5, "thresholds": {"zh": {"min_characters": 80}}}],
        "filter_ratios": [{"min_alpha_ratio": 0.5}],
        "filter_expression": [{"keep": "words > 20 and lang != 'de'"}],
        "filter_perplexity": [{"kenlm": str(directory / "tiny.arpa"), "max_perplexity": 25}]
        if importlib.util.find_spec("kenlm")
        else [],
        "decontaminate": [{"benchmarks": benchmarks, "action": action} for action in ("drop", "mark")],
    }


WITH_MODELS = ("token_length", "instruction_difficulty")  # tested with real ones among the tests of curating
FILTERS = [name for name in registry.OPERATORS if issubclass(registry.load(name), Filter) and name not in WITH_MODELS]


@pytest.mark.parametrize("name", FILTERS)
def test_decisions_follow_from_stored_scores_and_named_columns_row_by_row(name: str, entries: dict[str, list[Any]]) -> None:
    table = pa.table({"id": list(map(str, range(len(TEXTS)))), "text": TEXTS, "lang": pa.array(LANGS), "url": pa.array(URLS)})
    said = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}] for text in TEXTS]
    table = table.append_column("messages", pa.array(said, tables.CONVERSATIONS.field("messages").type))
    for options in entries.get(name, [{}]):
        operator = registry.build({name: options})
        assert isinstance(operator, Filter)
        if operator.changes_text:
            continue
        verdict = operator.process(table)
        assert verdict.scores, f"{name} must hand on its scores, or `danlu decide` cannot replay it"
        kept = pa.nulls(len(TEXTS), pa.string()) if verdict.reason is None else verdict.reason
        stored = io.BytesIO()
        pq.write_table(pa.table({**verdict.scores, **{f"@{key}": table[key] for key in operator.reads if key != "id"}}), stored)
        order = np.random.default_rng(0).permutation(len(TEXTS))
        read = pq.read_table(stored).take(pa.array(order)).combine_chunks()
        columns = {key[1:]: read[key] for key in read.column_names if key.startswith("@")}
        scores = {key: read[key].chunk(0) for key in verdict.scores}
        reason, value = operator.decide(pa.table({"position": pa.array(order), **columns}), scores)
        assert reason.to_pylist() == kept.take(pa.array(order)).to_pylist()
        if verdict.value is not None:
            assert value.to_pylist() == pytest.approx(verdict.value.take(pa.array(order)).to_pylist(), nan_ok=True, abs=0)
        empty, _ = operator.decide(pa.table({"position": order[:0], **{key: columns[key].slice(0, 0) for key in columns}}),
                                   {key: scores[key].slice(0, 0) for key in scores})  # fmt: skip
        assert len(empty) == 0


def test_measuring_all_rows_changes_no_decision_and_measures_every_filter_of_a_run() -> None:
    table = pa.table({"id": list(map(str, range(len(TEXTS)))), "text": TEXTS, "source": ["s"] * len(TEXTS)})
    operators = [
        "detect_language",
        "gopher_repetition",
        "gopher_quality",
        "redact_pii",
        "fineweb_quality",
        {"filter_lengths": {"min_words": 60}},
    ]
    plain, seen, every = (Chain(operators, measure).run(table) for measure in ("none", "seen", "all"))  # type: ignore[arg-type]
    for result in (seen, every):
        assert result.kept.equals(plain.kept) and result.funnel == plain.funnel
        assert [item.to_pylist() for item in result.rejects] == [item.to_pylist() for item in plain.rejects]
        assert result.measures is not None and result.measures.num_rows == len(TEXTS)
        step = result.measures["step"].to_numpy()
        rejected = [row for item in result.rejects for row in item["id"].to_pylist()]
        for row, (place, position) in enumerate(zip(step, result.measures["position"].to_pylist(), strict=True)):
            found = result.kept["id"][position].as_py() if place == KEPT else rejected[position]
            assert found == str(row)
    assert plain.measures is None
    assert segments(Chain(operators).operators) == [(0, 3), (4, 6)]
    step = every.measures["step"].to_numpy()
    assert every.measures["02.words"].null_count == 0 < seen.measures["02.words"].null_count
    came = (step == KEPT) | (step >= 4)
    assert (every.measures["05.words"].is_valid().to_numpy(zero_copy_only=False) == came).all()


def test_a_filter_that_keeps_its_scores_to_itself_is_not_replayed() -> None:
    chain = Chain(["redact_pii", "c4_quality"], "all")
    assert not any(map(replayable, chain.operators))
    assert chain.run(pa.table({"id": ["a"], "text": [ENGLISH], "source": ["s"]})).measures is None


def test_measures_of_batches_have_one_schema_whatever_reaches_a_filter(tmp_path: Path) -> None:
    chain = Chain(["gopher_quality", "fineweb_quality", {"bad_words": {"max_count": 0}}], "seen")
    some = chain.run(pa.table({"id": ["a"], "text": [ENGLISH * 4], "source": ["s"]})).measures
    none = chain.run(pa.table({"id": ["a"], "text": ["x"], "source": ["s"]})).measures
    assert some is not None and none is not None and some.schema == none.schema


def test_measures_are_committed_with_their_unit_and_taken_over_with_it(tmp_path: Path) -> None:
    measured = Chain(["gopher_quality"], "seen").run(pa.table({"id": ["a"], "text": [ENGLISH * 4], "source": ["s"]}))
    first, second = str(tmp_path / "run" / "web" / "f0"), str(tmp_path / "run" / "web" / "f1")
    writer = shards.UnitWriter(first, 0)
    writer.write(measured.kept)
    assert measured.measures is not None
    writer.measure(measured.measures)
    record = writer.commit(Ledger(rows_in=1, kept=1))
    shards.copy_unit(first, record, second, 7)
    manifests = [
        shards.finish(directory, stage="web", kind="corpus", fingerprint="f", config={}, inputs={}) for directory in (first, second)
    ]
    assert [part["sha256"] for part in manifests[0].measures] == [part["sha256"] for part in manifests[1].measures]
    assert manifests[1].measures[0]["name"].startswith("measures/00000007-")
    for directory, manifest in zip((first, second), manifests, strict=True):
        assert pq.read_table(f"{directory}/{manifest.measures[0]['name']}").equals(measured.measures)
    assert shards.load_manifest(second).measures == manifests[1].measures
