"""A kept index: new files against what earlier stages compared, without that text."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from operators import shards
from operators.config import SettingsError
from operators.dedup import index
from pipelines.recipe import parse_recipe
from pipelines.stages.dedup import DedupStage
from pipelines.trace import trace
from tests.operators.dedup.corpus import context_of, documents, removed_rows, write_corpus
from tests.operators.dedup.corpus import without_ray as without_ray  # a fixture

pytestmark = pytest.mark.usefixtures("without_ray")

OPTIONS: dict[str, Any] = {"threshold": 0.6, "bands": 28, "rows": 4}


def run(
    directory: Path, name: str, inputs: dict[str, str], limit: int | None = None, input: list[str] | None = None, **settings: Any
) -> Path:
    """Run a stage whose fingerprint is its name; its directory."""
    context = context_of(directory, name, inputs, fingerprint=name)
    context.limit, context.base_directory = limit, str(directory)
    DedupStage(input=input or list(inputs), **{**OPTIONS, **settings}).run(context)
    return Path(context.directory)


def outcome(directory: Path) -> dict[str, tuple[str, str]]:
    return {row["id"]: (row["reason"], row["kept_id"]) for row in removed_rows(directory)}


def pieces(directory: Path, table: pa.Table, cuts: list[int]) -> list[str]:
    edges = [0, *cuts, len(table)]
    slices = [table.slice(a, b - a) for a, b in itertools.pairwise(edges)]
    return [write_corpus(directory, f"batch{i}", piece, 23 + 5 * i) for i, piece in enumerate(slices)]


@pytest.mark.parametrize("extra", [{}, {"verify": True}, {"method": "exact"}, {"similarity": False, "signature": "datasketch"}])
def test_batch_after_batch_removes_what_one_pass_over_everything_does(tmp_path: Path, extra: dict[str, Any]) -> None:
    table = documents(16, seed=4)
    batches = pieces(tmp_path, table, [30, 31, 45])
    whole = outcome(run(tmp_path, "whole", {f"b{i}": path for i, path in enumerate(batches)}, partitions=3, **extra))
    found: dict[str, tuple[str, str]] = {}
    for number, (source, partitions) in enumerate(zip(batches, (1, 5, 2, 7), strict=True)):
        directory = run(tmp_path, f"day{number}", {"new": source}, index="kept", partitions=partitions, **extra)
        found |= outcome(directory)
        shutil.rmtree(source)  # later days must not read it
        stats = shards.load_manifest(str(directory)).stats["index"]
        assert stats["against"] == [f"day{earlier}" for earlier in range(number)]
        assert stats["grown"]["bytes"] > 0
    assert found == whole
    assert len(found) > 12
    assert [each.name for each in index.generations(str(tmp_path / "kept"))] == ["day0", "day1", "day2", "day3"]


def test_a_removed_row_names_its_match_in_the_index(tmp_path: Path) -> None:
    table = documents(20, seed=2)
    old, new = pieces(tmp_path, table, [45])
    run(tmp_path, "old", {"old": old}, index="kept")
    rows = removed_rows(run(tmp_path, "new", {"new": new}, index="kept", partitions=3))
    ids = table["id"].to_pylist()
    foreign = [row for row in rows if row["kept_from"] == "old"]
    assert len(foreign) > 15
    for row in rows:
        assert ids[45 + row["ordinal"]] == row["id"]
        for side in ("match", "kept"):
            first = 0 if row[f"{side}_from"] == "old" else 45
            assert ids[first + row[f"{side}_ordinal"]] == row[f"{side}_id"]
        assert row["id"].split("-")[0] == row["kept_id"].split("-")[0]
        assert row["similarity"] > 0.5


def test_verified_similarity_to_a_row_of_the_index_is_exact(tmp_path: Path) -> None:
    words = [f"w{'abcdefghijklmnopqrst'[i % 20]}{'abcdefghijklmnopqrst'[i // 20]}" for i in range(300)]
    old = pa.table({"id": ["a", "z"], "text": [" ".join(words[:200]), "你好" * 40]})
    new = pa.table({"id": ["b", "c"], "text": [" ".join(words[:190]), " ".join(words[:60] + words[220:])]})
    sources = [write_corpus(tmp_path, name, each, 5) for name, each in (("one", old), ("two", new))]
    run(tmp_path, "old", {"s": sources[0]}, index="kept", verify=True)
    rows = removed_rows(run(tmp_path, "new", {"s": sources[1]}, index="kept", verify=True))
    assert [(row["id"], row["match_id"], row["match_from"]) for row in rows] == [("b", "a", "old")]
    assert rows[0]["similarity"] == pytest.approx(186 / 196)


def test_an_index_is_never_overwritten_and_a_repeated_stage_sees_what_it_saw_before(tmp_path: Path) -> None:
    first, second, third = pieces(tmp_path, documents(12), [20, 34])
    run(tmp_path, "one", {"s": first}, index="kept")
    two = outcome(run(tmp_path, "two", {"s": second}, index="kept"))
    run(tmp_path, "three", {"s": third}, index="kept")
    before = contents(tmp_path / "kept")
    shutil.rmtree(tmp_path / "two")
    assert outcome(run(tmp_path, "two", {"s": second}, index="kept", partitions=4)) == two
    assert contents(tmp_path / "kept") == before
    limited = run(tmp_path, "limited", {"s": second}, limit=10, index="kept")
    compared = run(tmp_path, "compared", {"s": second}, index="kept", grow_index=False)
    assert contents(tmp_path / "kept") == before
    assert outcome(limited) == outcome(compared)
    assert shards.load_manifest(str(compared)).rows == 0  # all of its rows are in the index by now


def contents(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.rglob("*") if p.is_file()}


def test_an_unfinished_generation_does_not_count(tmp_path: Path) -> None:
    first, second = pieces(tmp_path, documents(10), [20])
    run(tmp_path, "one", {"s": first}, index="kept")
    (tmp_path / "kept" / "one" / "generation.json").unlink()
    assert index.generations(str(tmp_path / "kept")) == []
    directory = run(tmp_path, "two", {"s": second}, index="kept")
    assert shards.load_manifest(str(directory)).stats["index"]["against"] == []


def test_settings_that_differ_from_the_index_are_refused(tmp_path: Path) -> None:
    first, second = pieces(tmp_path, documents(4), [10])
    run(tmp_path, "one", {"s": first}, index="kept")
    with pytest.raises(SettingsError, match=r"kept: generation one was made with `seed: 1`, this stage has `seed: 2`"):
        run(tmp_path, "two", {"s": second}, index="kept", seed=2)
    with pytest.raises(SettingsError, match="keeps no shingle sets"):
        DedupStage(input="s", index="kept", verify=True, **OPTIONS).preflight(str(tmp_path))
    DedupStage(input="s", index="kept", **OPTIONS).preflight(str(tmp_path))
    record = json.loads((tmp_path / "kept" / "one" / "generation.json").read_bytes())
    record["against"] = ["zero"]
    (tmp_path / "kept" / "one" / "generation.json").write_text(json.dumps(record))
    with pytest.raises(SettingsError, match=r"compared with \['zero'\], which the index no longer holds"):
        run(tmp_path, "two", {"s": second}, index="kept")


def test_a_recipe_keeps_an_index_and_the_trace_names_it(tmp_path: Path) -> None:
    first, second = pieces(tmp_path, documents(8, seed=3), [20])
    recipe = parse_recipe(
        """
        name: demo
        stages:
          wiki: {kind: corpus, read: {path: w.jsonl}}
          web: {kind: corpus, read: {path: a.jsonl}}
          clean: {kind: dedup, input: web, reference: [wiki], priority: [news], index: kept, threshold: 0.6, bands: 28, rows: 4}
        """
    )
    run(tmp_path, "one", {"s": first}, index="kept")
    stage = recipe.stages["clean"]
    assert stage.input_names() == ["web", "wiki"]
    empty = write_corpus(tmp_path, "wiki", documents(1).slice(0, 0), 5)
    context = context_of(tmp_path, "clean", {"web": second, "wiki": empty})
    context.base_directory = str(tmp_path)
    stage.run(context)
    row = next(row for row in removed_rows(Path(context.directory)) if row["kept_from"] == "one")
    record = {"order": ["clean"], "stages": {"clean": {"directory": f"clean/{'1' * 8}", "status": "done", "inputs": ["web"]}}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (event,) = [event for event in trace(str(tmp_path), row["id"]) if event.what == "removed"]
    assert f"kept instead: {row['kept_id']} of one" in event.detail


def test_only_blocks_that_may_match_are_read_and_none_is_missed(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    hashes = np.sort(generator.integers(0, 1 << 64, 300_000, dtype=np.uint64))
    hashes[5000:9000] = hashes[5000]  # a bucket over several blocks
    records = np.column_stack([hashes, np.arange(300_000, dtype=np.uint64)])
    directory = str(tmp_path / "kept" / "one")
    for piece in (0, 1):
        index.write_records(directory, "bands", piece, directory, records[hashes >> np.uint64(63) == piece])
    generation = index.Generation("one", directory, {"partitions": 2})
    for wanted in (hashes[:1], hashes[5000:5001], hashes[-1:], hashes[::1777], hashes, np.array([1, 2**64 - 1], np.uint64)):
        wanted = np.unique(wanted)
        found = np.concatenate([np.empty((0, 2), np.uint64), *index.lookup(generation, "bands", 2, wanted)])
        assert found.tolist() == records[np.isin(hashes, wanted)].tolist()
