"""The corpus stage: every row accounted for, the same bytes from any number of workers, the same rows from any plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators import shards
from operators.chain import Chain
from operators.config import SettingsError
from operators.stage import StageContext
from pipelines.stages.corpus import CorpusStage

OWN = "tests.operators.own"


@pytest.fixture
def run_stage(tmp_path: Path, ray_cluster: None) -> Callable[..., shards.Manifest]:
    def run(
        name: str, read: dict[str, Any], operators: list[Any], workers: int = 2, events: Any = None, **settings: Any
    ) -> shards.Manifest:
        stage = CorpusStage.model_validate({"kind": "corpus", "read": read, "operators": operators, **settings})
        directory = str(tmp_path / "run" / "corpus" / name)
        context = StageContext("corpus", "corpus", directory, name, {}, {}, 0, workers=workers, base_directory=str(tmp_path))
        if events is not None:
            context.event = lambda message, facts: events.append((message, facts))
        stage.run(context)
        return shards.load_manifest(directory)

    return run


def write_lines(directory: Path, count: int = 300) -> None:
    for number in range(3):
        rows = [
            {"id": f"{number}-{i}", "text": f"{'short' if i % 10 == 0 else '一篇足够长的文章 and words'} {i}" * (1 + i % 7)}
            for i in range(count)
        ]
        rows[17]["text"] = "ab"
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n{broken\n"
        (directory / f"in{number}.jsonl").write_text(data, encoding="utf-8")


def rows_of(manifest: shards.Manifest, tmp_path: Path) -> list[tuple[str, str]]:
    directory = tmp_path / "run" / "corpus" / manifest.fingerprint
    tables = [pq.read_table(directory / part["name"]) for part in manifest.parts]
    table = pa.concat_tables(tables)
    return list(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))


def digests(manifest: shards.Manifest) -> list[str]:
    return [part["sha256"] for part in manifest.parts + manifest.rejects]


def test_any_number_of_workers_gives_the_same_bytes_and_any_plan_the_same_rows(
    tmp_path: Path, run_stage: Callable[..., shards.Manifest]
) -> None:
    write_lines(tmp_path)
    operators = [{f"{OWN}:DropShort": {"minimum": 4}}]
    one = run_stage("one", {"path": "*.jsonl"}, operators, workers=1)
    two = run_stage("two", {"path": "*.jsonl"}, operators, workers=2)
    assert digests(one) == digests(two)
    small = run_stage("small", {"path": "*.jsonl", "max_unit_bytes": 9000}, operators, batch_rows=7)
    assert len(small.parts) > len(one.parts)
    assert rows_of(small, tmp_path) == rows_of(one, tmp_path)
    assert small.ledger == one.ledger
    assert one.ledger.to_json() == {
        "in": 903,
        "created": 0,
        "kept": 897,
        "rejected": {"drop_short:too_short": 3},
        "quarantined": 3,
    }


def test_a_document_that_crashes_a_native_library_is_set_aside_alone(
    tmp_path: Path, run_stage: Callable[..., shards.Manifest]
) -> None:
    rows = [{"id": f"d{i}", "text": f"good text {i}"} for i in range(50)]
    rows[31]["text"] = "this one makes the library SEGFAULT"
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    events: list[tuple[str, dict[str, Any]]] = []
    manifest = run_stage("crash", {"path": "in.jsonl"}, [f"{OWN}:Crash"], batch_rows=16, events=events)
    assert manifest.ledger.to_json() == {"in": 50, "created": 0, "kept": 49, "rejected": {}, "quarantined": 1}
    rejects = pq.read_table(tmp_path / "run" / "corpus" / "crash" / manifest.rejects[0]["name"]).to_pylist()
    assert [(row["id"], row["quarantined"]) for row in rejects] == [("d31", True)]
    assert "SIGSEGV" in rejects[0]["reason"]
    assert rejects[0]["text"] == rows[31]["text"]
    ((message, facts),) = events
    assert message == "unit retried" and (facts["unit"], facts["attempts"], facts["set_aside"]) == (0, 2, 1)
    assert "SIGSEGV" in facts["failed"][0] and list(facts["rows"]) == ["31"]


def test_a_new_input_file_is_processed_alone(
    tmp_path: Path, run_stage: Callable[..., shards.Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path)
    run_stage("before", {"path": "*.jsonl"}, [])
    (tmp_path / "in00.jsonl").write_text('{"id": "new", "text": "a new file that sorts second"}\n', encoding="utf-8")
    after = run_stage("after", {"path": "*.jsonl"}, [])
    fresh = run_stage("fresh", {"path": "*.jsonl", "max_text_bytes": 1 << 20}, [])
    assert shards.load_timings(str(tmp_path / "run/corpus/after"))["adopted_units"] == 3
    assert shards.load_timings(str(tmp_path / "run/corpus/fresh"))["adopted_units"] == 0
    assert digests(after) == digests(fresh)
    assert after.ledger == fresh.ledger
    monkeypatch.setattr(CorpusStage, "version", CorpusStage.version + 1)  # the code decides otherwise now
    run_stage("newer", {"path": "*.jsonl"}, [])
    assert shards.load_timings(str(tmp_path / "run/corpus/newer"))["adopted_units"] == 0


def test_an_operator_that_loses_rows_is_refused() -> None:
    with pytest.raises(SettingsError, match="returned 1 rows for 2"):
        Chain([f"{OWN}:LosesRows"]).run(pa.table({"id": ["a", "b"], "text": ["x", "y"]}))


def test_a_missing_column_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"drop_short needs column \['text'\]"):
        Chain([f"{OWN}:DropShort"]).run(pa.table({"id": ["a"]}))


def test_every_operator_sees_what_the_one_before_it_kept() -> None:
    table = pa.table({"id": ["a", "b", "c"], "text": ["tiny", "long enough", "also long"], "source": ["s"] * 3})
    result = Chain([f"{OWN}:DropShort", {f"{OWN}:DropShort": {"minimum": 10}}]).run(table)
    assert result.funnel == {
        "00:drop_short": {"in": 3, "kept": 2, "rejected": {"too_short": 1}},
        "01:drop_short": {"in": 2, "kept": 1, "rejected": {"too_short": 1}},
    }
    assert [r["text"].to_pylist() for r in result.rejects] == [["tiny"], ["also long"]]
    assert [r["value"].to_pylist() for r in result.rejects] == [[4.0], [9.0]]
