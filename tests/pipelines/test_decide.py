"""`danlu decide`: a replay from measures makes the stage's decisions again, and with other settings those a run would make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from operators import shards
from operators.config import SettingsError
from operators.corpus import run_unit
from operators.measures import Measure
from operators.sources.units import ReadSettings, plan_units
from operators.supervise import Report, Task
from pipelines.cli import main
from pipelines.decide import decide
from tests.conftest import ROOT

OPERATORS: list[Any] = [
    "fix_text",
    {"detect_language": {"keep": ["en", "zh"]}},
    "gopher_repetition",
    {"gopher_quality": {"thresholds": {"*": {"min_alpha_words": 0.6}}}},
    "c4_quality",
    "fineweb_quality",
    "bad_words",
    "redact_pii",
]
Fates = dict[str, str]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of one corpus stage over the example documents, done unit by unit in this process; cached by its settings."""
    done: dict[str, Path] = {}

    def run(operators: list[Any], measure: Measure = "seen", batch_rows: int = 200) -> Path:
        key = json.dumps([operators, measure, batch_rows])
        if key not in done:
            done[key] = tmp_path_factory.mktemp("run")
            directory = str(done[key] / "web" / "f0")
            read = ReadSettings(path=["examples/data/documents.parquet", "examples/data/notes.jsonl"], max_unit_bytes=1 << 18)
            for unit in plan_units(read, str(ROOT), 450):
                given = {
                    "unit": unit.to_json(), "read": read.model_dump(mode="json"), "operators": operators,
                    "directory": directory, "key": unit.key, "batch_rows": batch_rows, "measure": measure,
                }  # fmt: skip
                run_unit(Task(given), Report(lambda message: None))
            config = {"operators": operators, "measure": measure}
            shards.finish(directory, stage="web", kind="corpus", fingerprint="f0", config=config, inputs={})
            stages = {"web": {"directory": "web/f0", "status": "done", "inputs": []}}
            (done[key] / "run.json").write_text(json.dumps({"order": ["web"], "stages": stages}))
        return done[key]

    return run


def fates(run: Path) -> Fates:
    """id -> `kept` or `NN:operator: reason`, as the stage left it (operators of this file's chains stand once)."""
    directory = run / "web" / "f0"
    manifest = shards.load_manifest(str(directory))
    names = {key.split(":")[1]: key for unit in shards.committed_units(str(directory)).values() for key in unit["stats"]["funnel"]}
    found: Fates = {}
    for part in manifest.parts:
        found.update(dict.fromkeys(pq.read_table(directory / part["name"], columns=["id"])["id"].to_pylist(), "kept"))
    for part in manifest.rejects:
        for row in pq.read_table(directory / part["name"]).to_pylist():
            if not row["quarantined"]:
                found[row["id"]] = f"{names[row['operator']]}: {row['reason']}"
    return found


@pytest.mark.parametrize("measure", ["seen", "all"])
def test_unchanged_settings_replay_to_exactly_the_decisions_of_the_stage(run_of: Callable[..., Path], measure: Measure) -> None:
    run = run_of(OPERATORS, measure)
    [decision] = decide(str(run), [])
    ledger = shards.load_manifest(decision.directory).ledger
    assert decision.outcome.rows == ledger.kept + ledger.rejected.total() > 400
    assert decision.outcome.disagreeing == 0 and not decision.changes()
    by_reason: dict[str, int] = {}
    languages = set()
    for (old, new, lang), count in decision.outcome.fates.items():
        assert old == new
        languages.add(lang)
        if old.kind == "rejected":
            key = f"{old.operator.split(':')[1]}:{old.reason}"
            by_reason[key] = by_reason.get(key, 0) + count
    assert by_reason == dict(ledger.rejected)
    assert {"en", "zh"} <= languages
    assert fates(run) == fates(run_of(OPERATORS, "none"))


def changed(operators: list[Any], name: str, options: dict[str, Any]) -> list[Any]:
    return [{name: options} if (item if isinstance(item, str) else next(iter(item))) == name else item for item in operators]


@pytest.mark.parametrize(
    ("settings", "name", "options"),
    [
        (["gopher_quality.min_words=120"], "gopher_quality", {"thresholds": {"*": {"min_alpha_words": 0.6, "min_words": 120}}}),
        (
            ["web.gopher_quality.zh.min_words=150", "gopher_quality.thresholds.zh.min_stop_words=null"],
            "gopher_quality",
            {"thresholds": {"*": {"min_alpha_words": 0.6}, "zh": {"min_words": 150, "min_stop_words": None}}},
        ),
        (["detect_language.threshold=0.97"], "detect_language", {"keep": ["en", "zh"], "threshold": 0.97}),
        (["fineweb_quality.min_line_punctuation=null"], "fineweb_quality", {"thresholds": {"*": {"min_line_punctuation": None}}}),
    ],
)
def test_a_replay_says_what_a_run_with_the_other_settings_does(
    run_of: Callable[..., Path], settings: list[str], name: str, options: dict[str, Any]
) -> None:
    before, truth = fates(run_of(OPERATORS)), fates(run_of(changed(OPERATORS, name, options)))
    undecided = {}
    for measure in ("seen", "all"):
        [decision] = decide(str(run_of(OPERATORS, measure)), settings, examples=100_000)
        told = dict(before)
        for (old, new), rows in decision.examples.items():
            for row in rows:
                assert before[row.id] == str(old)
                told[row.id] = str(new)
        unknown = {key for key, fate in told.items() if fate.startswith("undecided")}
        assert {key: fate for key, fate in told.items() if key not in unknown} == {
            key: fate for key, fate in truth.items() if key not in unknown
        }
        assert told != before
        least, most = decision.kept[1:]
        assert least <= list(truth.values()).count("kept") <= most
        assert most - least == len(unknown)
        undecided[measure] = unknown
        if name == "fineweb_quality":  # what comes after cannot reject or was measured
            assert not unknown or measure == "seen"
    assert undecided["all"] <= undecided["seen"]


OWN: list[Any] = [
    {"detect_language": {"keep": ["en", "zh"]}},
    {"filter_lengths": {"min_characters": 100}},
    {"filter_ratios": {"max_digit_ratio": 0.2}},
    {"filter_expression": {"keep": "words >= 60 and (alpha_ratio > 0.7 or lang == 'zh')"}},
]


@pytest.mark.parametrize(
    ("settings", "operators"),
    [
        (["filter_lengths.min_characters=400"], changed(OWN, "filter_lengths", {"min_characters": 400})),
        (
            ["filter_lengths.zh.max_tokens=300", "filter_ratios.max_symbol_ratio=0.01"],
            changed(
                changed(OWN, "filter_lengths", {"min_characters": 100, "thresholds": {"zh": {"max_tokens": 300}}}),
                "filter_ratios",
                {"max_digit_ratio": 0.2, "max_symbol_ratio": 0.01},
            ),
        ),
        (
            ["filter_expression.keep=longest_word < 40 and (lang == 'zh' and words > 20 or upper_ratio < 0.05)"],
            changed(
                OWN, "filter_expression", {"keep": "longest_word < 40 and (lang == 'zh' and words > 20 or upper_ratio < 0.05)"}
            ),
        ),
        (
            ["detect_language.threshold.zh=0.99"],
            changed(OWN, "detect_language", {"keep": ["en", "zh"], "threshold": {"*": 0.5, "zh": 0.99}}),
        ),
    ],
)
def test_with_all_measures_every_row_of_a_run_of_filters_is_decided(
    run_of: Callable[..., Path], settings: list[str], operators: list[Any]
) -> None:
    truth = fates(run_of(operators, "none"))
    [decision] = decide(str(run_of(OWN, "all")), settings, examples=100_000)
    told = fates(run_of(OWN, "all"))
    told.update({row.id: str(new) for (_, new), rows in decision.examples.items() for row in rows})
    assert told == truth
    assert decision.examples


def test_an_expression_over_what_was_not_measured_needs_a_run(run_of: Callable[..., Path]) -> None:
    operators = [{"filter_expression": {"keep": "characters > 10"}}]
    with pytest.raises(SettingsError, match="words = True was not measured"):
        decide(str(run_of(operators)), ["filter_expression.keep=words > 3"])
    [decision] = decide(str(run_of(operators)), ["filter_expression.keep=characters > 500 and han_ratio < 0.3"])
    assert decision.changes()


def test_counts_do_not_depend_on_batches_and_rows_are_found_across_units(run_of: Callable[..., Path]) -> None:
    small, large = (decide(str(run_of(OPERATORS, "seen", rows)), ["gopher_quality.min_words=200"])[0] for rows in (64, 200))
    assert small.outcome.fates == large.outcome.fates
    assert small.examples == large.examples
    text = {row["id"]: row["text"] for row in pq.read_table(ROOT / "examples/data/documents.parquet").to_pylist()}
    for rows in small.examples.values():
        for row in rows:
            assert row.id not in text or row.text[:20].strip() in " ".join(text[row.id].split())


def test_measures_are_the_same_bytes_each_time_and_small(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of(OPERATORS)
    manifest = shards.load_manifest(str(run / "web" / "f0"))
    rows = sum(part["rows"] for part in manifest.measures)
    assert rows == manifest.ledger.kept + manifest.ledger.rejected.total()
    assert sum(part["bytes"] for part in manifest.measures) < 200 * rows
    again = run_of([*OPERATORS[:-1], {"redact_pii": {}}])
    digests = [part["sha256"] for part in shards.load_manifest(str(again / "web" / "f0")).measures]
    assert digests == [part["sha256"] for part in manifest.measures]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["web.gopher_qualty.min_words=3"], "did you mean 'gopher_quality'"),
        (["gopher_quality.min_word=3"], "did you mean 'min_words'"),
        (["gopher_quality.zh.min_wrds=3"], "did you mean 'min_words'"),
        (["gopher_quality.min_words=many"], "valid integer"),
        (["gopher_quality"], "STAGE.]OPERATOR.OPTION=VALUE"),
        (["wbe.gopher_quality.min_words=3"], "did you mean 'web'"),
        (["fix_text.blank_lines=3"], "changes the text"),
        (["detect_language.window=300"], "needs a run"),
        (["gopher_quality.ko.min_stop_words=1"], "stop_words of ko"),
        (["gopher_quality.en.stop_words=[zebra]"], "needs a run"),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_name(run_of: Callable[..., Path], settings: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("[", r"\[").replace("]", r"\]")):
        decide(str(run_of(OPERATORS)), settings)


def test_a_decision_that_uses_more_than_it_says_is_refused(run_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"00:drop_by_source: .*source.* neither a score nor in `reads`"):
        decide(str(run_of(["tests.operators.own:DropBySource"])), [])
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"q": "How do I insert a table into a document of mine, please?"}), encoding="utf-8")
    mark = {"decontaminate": {"benchmarks": [{"path": str(items), "fields": ["q"]}], "action": "mark"}}
    run = run_of([mark, {"filter_expression": {"keep": "contaminated_by is None"}}])
    with pytest.raises(SettingsError, match="makes column 'contaminated_by' from its decisions, and filter_expression reads it"):
        decide(str(run), ["decontaminate.min_overlap=0.5"])


@pytest.mark.slow
def test_several_processes_tell_the_same(run_of: Callable[..., Path]) -> None:
    one, two = (decide(str(run_of(OPERATORS)), ["gopher_quality.min_words=90"], workers=workers)[0] for workers in (1, 2))
    assert one.to_json() == two.to_json()


def test_a_stage_without_measures_and_a_folder_without_a_run_are_told(run_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="kept no measures"):
        decide(str(run_of(OPERATORS, "none")), ["gopher_quality.min_words=3"])
    with pytest.raises(FileNotFoundError, match="is no run"):
        decide(str(tmp_path), [])


def test_the_command_prints_changes_with_examples(run_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = str(run_of(OPERATORS, "all"))
    assert main(["decide", run]) == 0
    assert "makes every decision of the stage again" in capsys.readouterr().out
    assert main(["decide", run, "--set", "web.gopher_quality.min_words=90", "--examples", "1", "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert told["kept"]["after"] < told["kept"]["before"]
    [first] = [change for change in told["changes"] if change["to"]["reason"] == "short" and change["from"]["kind"] == "kept"]
    assert first["rows"] == sum(first["languages"].values())
    assert first["examples"][0]["value"] < 90 and first["examples"][0]["text"]
    assert main(["decide", run, "--set", "web.gopher_quality.min_words=90"]) == 0
    assert "kept -> 03:gopher_quality: short" in capsys.readouterr().out
    assert main(["decide", run, "--set", "web.gopher_quality.min_wrds=90"]) == 2
