"""Two runs compared: settings, counts, rows that changed sides, in bounded memory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import storage
from operators import shards
from operators.config import SettingsError
from operators.ledger import Ledger
from operators.tables import rejects_table
from pipelines import diff as module
from pipelines.diff import diff, lines
from tests.cluster.object_store import BUCKET, Line
from tests.pipelines.test_clean import make_run

A, B = "a" * 16, "b" * 16
Row = tuple[str, str]  # id, side


def stage(run: str, name: str, fingerprint: str, rows: list[Row], config: dict[str, Any] | None = None, **more: Any) -> str:
    """A finished stage with the rows of each side: `kept` or `rejected OPERATOR: REASON`, in two units."""
    directory = storage.join(run, name, fingerprint)
    for unit in range(2):
        writer, ledger = shards.UnitWriter(directory, unit), Ledger()
        for key, side in rows[unit::2]:
            ledger.rows_in += 1
            if side == "kept":
                writer.write(pa.table({"id": [key], "text": [f"text of {key}"]}))
                ledger.kept += 1
            else:
                fate, _, reason = side.partition(" ")
                operator, reason = reason.split(": ")
                quarantined = fate == "quarantined"
                row = {"id": key, "text": f"text of {key}", "operator": operator, "reason": reason, "value": 7.25}
                writer.reject(rejects_table([{**row, "quarantined": quarantined}]))
                if quarantined:
                    ledger.quarantined += 1
                else:
                    ledger.rejected[f"{operator}:{reason}"] += 1
        writer.commit(ledger, more.get("stats"))
    shards.finish(directory, stage=name, kind=more.get("kind", "corpus"), fingerprint=fingerprint, config=config or {}, inputs={})
    make_run(run, {name: fingerprint})
    return directory


def expected(first: list[Row], second: list[Row]) -> tuple[Counter[tuple[str, str]], int]:
    """By hand: rows of one id are paired in the order of their units and their files, kept before rejected."""
    sides = []
    for rows in (first, second):
        stored = [row for unit in range(2) for row in rows[unit::2]]
        placed: dict[str, list[str]] = {}
        for key, side in [row for row in stored if row[1] == "kept"] + [row for row in stored if row[1] != "kept"]:
            placed.setdefault(key, []).append(side)
        sides.append(placed)
    changes, unchanged = Counter[tuple[str, str]](), 0
    for key in {**sides[0], **sides[1]}:
        one, two = sides[0].get(key, []), sides[1].get(key, [])
        for place in range(max(len(one), len(two))):
            pair = (one[place] if place < len(one) else "absent", two[place] if place < len(two) else "absent")
            if pair[0] == pair[1]:
                unchanged += 1
            else:
                changes[pair] += 1
    return changes, unchanged


sides = st.sampled_from(["kept", "rejected short: few", "rejected lang: other", "quarantined read: torn"])
some_rows = st.lists(st.tuples(st.sampled_from([f"d{n}" for n in range(12)]), sides), max_size=14)


@settings(max_examples=12, deadline=None)
@given(first=some_rows, second=some_rows, memory=st.sampled_from([1, 4, 1000]))
def test_rows_that_changed_sides_are_those_found_by_hand_whatever_the_memory(
    first: list[Row], second: list[Row], memory: int
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, fingerprint, rows in (("one", A, first), ("two", B, second)):
            stage(f"{folder}/{name}", "web", fingerprint, rows)
        (found,) = diff(f"{folder}/one", f"{folder}/two", memory_rows=memory).stages
        assert (found.changes, found.unchanged) == expected(first, second)
        for (before, after), examples in found.examples.items():
            assert 1 <= len(examples) <= min(3, found.changes[before, after])
            assert all(example.text == f"text of {example.id}" for example in examples)


def test_settings_and_counts_and_the_number_that_decided_are_told(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    rows = [(f"d{n}", "kept") for n in range(4)]
    stage(
        one, "web", A, [*rows, ("x", "rejected short: few")], {"operators": [{"short": {"least": 5}}, "fix"]}, stats={"tokens": 40}
    )
    stage(two, "web", B, [*rows, ("x", "kept")], {"operators": [{"short": {"least": 2}}, "fix"]}, stats={"tokens": 50})
    found = diff(one, two)
    (web,) = found.stages
    assert web.settings == [("operators.short.least", 5, 2)]
    assert ("kept", 4, 5) in web.counts and ("rejected.short:few", 1, 0) in web.counts and ("tokens", 80, 100) in web.counts
    told = "\n".join(lines(found))
    assert "operators.short.least: 5 -> 2" in told and "rejected short: few -> kept" in told
    assert "x (7.25 -> -): text of x" in told and "tokens: 80 -> 100 (+25.0%)" in told
    as_json = json.loads(json.dumps(found.to_json()))
    assert as_json["stages"][0]["rows"] == {
        "unchanged": 4,
        "changed": [
            {"from": "rejected short: few", "to": "kept", "rows": 1,
             "examples": [{"id": "x", "before": "7.25", "after": "", "text": "text of x"}]}
        ],
    }  # fmt: skip


def test_a_view_tells_what_was_removed_and_what_was_kept_instead(tmp_path: Path) -> None:
    for name, fingerprint, gone in (("one", A, [1]), ("two", B, [2])):
        run = str(tmp_path / name)
        base = stage(run, "web", A, [(f"d{n}", "kept") for n in range(4)])
        place = storage.join(run, "clean", fingerprint)
        view = []
        for number, part in enumerate(shards.parts([base])):
            removed = np.isin(np.arange(part.rows) + part.first_ordinal, gone)
            bitmap = shards.save_bitmap(place, number, removed)
            path = shards.relative_to_run(place, part.path)
            view.append({"path": path, "rows": part.rows, "removed": bitmap, "removed_rows": int(removed.sum())})
        ids = ["d0", "d2", "d1", "d3"]  # the order of the units
        table = pa.table({"id": [ids[n] for n in gone], "reason": ["exact"], "kept_id": ["d0"], "similarity": [0.9]})
        Path(place, "removed").mkdir(exist_ok=True)
        pq.write_table(table, f"{place}/removed/t.parquet")
        ledger = Ledger(4, 0, 3, Counter({"exact:duplicate": 1}))
        shards.finish(
            place, stage="clean", kind="dedup", fingerprint=fingerprint, config={}, inputs={"web": f"web/{A}"}, ledger=ledger,
            view=view, files={"removed": ["removed/t.parquet"]},
        )  # fmt: skip
        make_run(run, {"web": A, "clean": fingerprint})
    web, clean = diff(str(tmp_path / "one"), str(tmp_path / "two")).stages
    assert web.same and not web.changes
    assert clean.changes == {("removed exact", "kept"): 1, ("kept", "removed exact"): 1} and clean.unchanged == 2
    (example,) = clean.examples["removed exact", "kept"]
    assert example.id == "d2" and example.before == "0.9, kept instead: d0"


def test_memory_is_bounded_by_the_setting_and_not_by_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for name, fingerprint, odd in (("one", A, 0), ("two", B, 1)):
        run = str(tmp_path / name)
        place = storage.join(run, "web", fingerprint)
        writer = shards.UnitWriter(place, 0)
        for start in range(0, 200_000, 20_000):
            writer.write(
                pa.table(
                    {"id": [f"document-{n}" for n in range(start + odd * 50, start + 20_000)], "text": [""] * (20_000 - odd * 50)}
                )
            )
        rows = 200_000 - odd * 500
        writer.commit(Ledger(rows_in=rows, kept=rows))
        shards.finish(place, stage="web", kind="corpus", fingerprint=fingerprint, config={}, inputs={})
        make_run(run, {"web": fingerprint})
        runs.append(run)
    joins: list[module._Join] = []
    made = module._Join.__init__

    def noted(join: module._Join, *arguments: Any) -> None:
        made(join, *arguments)
        joins.append(join)

    monkeypatch.setattr(module._Join, "__init__", noted)
    loads: list[int] = []
    load = module._Join._load

    def counted(join: module._Join, run: int, partition: int) -> np.ndarray:
        found = load(join, run, partition)
        loads.append(len(found))
        return found

    monkeypatch.setattr(module._Join, "_load", counted)
    (web,) = diff(*runs, memory_rows=20_000).stages
    assert web.changes == {("kept", "absent"): 500} and web.unchanged == 199_500
    assert max(first + second for first, second in zip(loads[::2], loads[1::2], strict=True)) == joins[0].largest <= 20_000
    assert len(loads) == 50  # 2 x 200,000 rows and a quarter, in partitions of 20,000


def test_runs_on_an_object_store_are_compared(line: Line) -> None:
    one, two = f"s3://{BUCKET}/diff/one", f"s3://{BUCKET}/diff/two"
    stage(one, "web", A, [("a", "kept"), ("b", "rejected short: few")])
    stage(two, "web", B, [("a", "kept"), ("b", "kept")])
    assert diff(one, two).stages[0].changes == {("rejected short: few", "kept"): 1}


def test_stages_of_one_run_alone_rows_without_ids_and_wrong_names_are_told(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    stage(one, "web", A, [("a", "kept")])
    place = storage.join(two, "pack", B)
    writer = shards.UnitWriter(place, 0)
    writer.write(pa.table({"sequence": [1]}))
    writer.commit(Ledger(created=1, kept=1))
    shards.finish(place, stage="pack", kind="pack", fingerprint=B, config={}, inputs={})
    make_run(two, {"pack": B})
    assert [(found.stage, found.only_in) for found in diff(one, two).stages] == [("web", "first"), ("pack", "second")]
    with pytest.raises(SettingsError, match="did you mean 'pack'"):
        diff(one, two, stage="pakc")
    with pytest.raises(FileNotFoundError, match="is no run"):
        diff(one, str(tmp_path))


def test_of_a_training_stage_the_last_loss_and_the_scores_by_name_are_compared(tmp_path: Path) -> None:
    runs = []
    for name, fingerprint, loss, scores in (
        ("one", A, 2.0, [{"model": "base", "perplexity": 40.0}]),
        ("two", B, 1.5, [{"model": "new", "perplexity": 9.0}, {"model": "base", "perplexity": 30.0}]),
    ):
        run = str(tmp_path / name)
        place = storage.join(run, "base", fingerprint)
        stats = {"curve": [{"step": 1, "loss": 9.0}, {"step": 2, "loss": loss}], "perplexity": scores}
        shards.finish(place, stage="base", kind="pretrain", fingerprint=fingerprint, config={}, inputs={}, stats=stats)
        make_run(run, {"base": fingerprint})
        runs.append(run)
    counts = {key: (one, two) for key, one, two in diff(*runs).stages[0].counts}
    assert counts["curve.last.loss"] == (2.0, 1.5) and counts["perplexity.base.perplexity"] == (40.0, 30.0)
    assert counts["perplexity.new.perplexity"] == (0, 9.0)
