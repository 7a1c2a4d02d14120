"""Who stays: references, inputs in order, sources in order, before the keep rule."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from operators import shards
from operators.dedup.signatures import shingle_sets
from pipelines.stages.dedup import DedupStage
from tests.operators.dedup.corpus import context_of, directory_of, documents, kept_ids, removed_rows, run_stage, write_corpus
from tests.operators.dedup.corpus import without_ray as without_ray  # a fixture

pytestmark = pytest.mark.usefixtures("without_ray")

OPTIONS: dict[str, Any] = {"threshold": 0.6, "bands": 28, "rows": 4}


def family(name: str) -> str:
    return name.split("-")[0]


def with_sources(table: pa.Table, sources: list[str]) -> pa.Table:
    column = pa.array([sources[row % len(sources)] for row in range(len(table))])
    return table.set_column(table.column_names.index("source"), "source", column)


def test_a_row_of_a_preferred_source_stays_and_the_keep_rule_decides_among_equals(tmp_path: Path) -> None:
    table = with_sources(documents(14, seed=3), ["forum", "news", "wiki"])
    source = write_corpus(tmp_path, "web", table, 13)
    run_stage(tmp_path, "clean", {"web": source}, priority=["wiki", "news"], keep="longest", **OPTIONS)
    rows = {row["id"]: row for row in table.to_pylist()}
    kept = [name for name in kept_ids(directory_of(tmp_path, "clean")) if name.startswith("f")]
    assert len(kept) == 14
    order = {"wiki": 0, "news": 1, "forum": 2}
    for name in kept:
        members = [row for row in rows.values() if family(row["id"]) == family(name)]
        best = min((order[row["source"]], -len(row["text"])) for row in members)
        assert (order[rows[name]["source"]], -len(rows[name]["text"])) == best
    assert len({rows[name]["source"] for name in kept}) > 1


def test_rows_of_an_earlier_input_stay_before_longer_ones_of_a_later(tmp_path: Path) -> None:
    table = documents(12, seed=5)
    first, second = write_corpus(tmp_path, "docs", table.slice(0, 25), 9), write_corpus(tmp_path, "web", table.slice(25), 9)
    run_stage(tmp_path, "clean", {"docs": first, "web": second}, input_priority=True, keep="longest", **OPTIONS)
    ids = table["id"].to_pylist()
    early = {family(name) for name in ids[:25] if name.startswith("f")}
    kept = [name for name in kept_ids(directory_of(tmp_path, "clean")) if name.startswith("f")]
    assert len(kept) == 12
    for name in kept:
        assert (ids.index(name) < 25) == (family(name) in early)


@pytest.mark.parametrize("extra", [{}, {"verify": True, "partitions": 3}])
def test_a_reference_removes_others_and_is_no_part_of_the_result(tmp_path: Path, extra: dict[str, Any]) -> None:
    table = documents(12, seed=6)
    web, wiki = write_corpus(tmp_path, "web", table.slice(0, 40), 9), write_corpus(tmp_path, "wiki", table.slice(40), 9)
    context = context_of(tmp_path, "clean", {"web": web, "wiki": wiki})
    DedupStage(input="web", reference="wiki", **OPTIONS, **extra).run(context)
    directory, ids = directory_of(tmp_path, "clean"), table["id"].to_pylist()
    known = {family(name) for name in ids[40:]}
    kept, manifest = kept_ids(directory), shards.load_manifest(str(directory))
    assert set(kept) <= set(ids[:40])
    alone = {family(name) for name in ids[:40]} - known
    assert {family(name) for name in kept if name.startswith("f")} == {name for name in alone if name.startswith("f")}
    assert manifest.ledger.rows_in == 40
    assert manifest.ledger.kept == len(kept)
    assert all(part["path"].startswith("web/") for part in manifest.view or [])
    rows = removed_rows(directory)
    for row in rows:
        assert ids[row["ordinal"]] == row["id"]
        assert ids[row["kept_ordinal"] + (40 if row["kept_from"] else 0)] == row["kept_id"]
        assert (row["kept_from"] == "wiki") == (row["kept_id"] in ids[40:])
    assert {row["kept_from"] for row in rows} == {None, "wiki"}


def test_a_reference_that_is_an_input_too_stays_whole(tmp_path: Path) -> None:
    table = documents(12, seed=7)
    web, wiki = write_corpus(tmp_path, "web", table.slice(0, 28), 9), write_corpus(tmp_path, "wiki", table.slice(28), 9)
    context = context_of(tmp_path, "clean", {"web": web, "wiki": wiki})
    DedupStage(input=["web", "wiki"], reference=["wiki"], **OPTIONS).run(context)
    kept, ids = kept_ids(directory_of(tmp_path, "clean")), table["id"].to_pylist()
    assert kept[-len(ids[28:]) :] == ids[28:]  # its own duplicates among them
    alone = {family(name) for name in ids[:28]} - {family(name) for name in ids[28:]}
    assert {family(name) for name in kept if name in ids[:28] and name.startswith("f")} == {a for a in alone if a.startswith("f")}
    assert {row["kept_from"] for row in removed_rows(directory_of(tmp_path, "clean"))} == {None}


def test_the_similarity_of_a_verified_match_is_exact(tmp_path: Path) -> None:
    table = documents(16, seed=8)
    source = write_corpus(tmp_path, "web", table, 20)
    manifest = run_stage(tmp_path, "clean", {"web": source}, verify=True, keep="best", partitions=3, **OPTIONS)
    texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    rows = removed_rows(directory_of(tmp_path, "clean"))
    hashes, offsets = shingle_sets(pa.array([texts[row[side]] for row in rows for side in ("id", "match_id")]))
    sets = [set(hashes[a:b].tolist()) for a, b in itertools.pairwise(offsets.tolist())]
    for number, row in enumerate(rows):
        a, b = sets[2 * number : 2 * number + 2]
        exact = 1.0 if row["reason"] == "exact:duplicate" else len(a & b) / len(a | b)
        assert row["similarity"] == pytest.approx(exact)
    pairs = manifest.stats["minhash"]["pairs"]
    assert 32 < pairs["checked"] <= 16 * 3  # three different texts in each family: three pairs, each once
    assert pairs["unchecked"] == 0
    assert manifest.stats["minhash"]["clusters"] == {"3": 16}


def test_both_back_ends_keep_the_same_rows(tmp_path: Path) -> None:
    table = documents(10, seed=9)
    source = write_corpus(tmp_path, "web", table, 15)
    for name, settings in (("a", {}), ("b", {"backend": "datasketch"})):
        run_stage(tmp_path, name, {"web": source}, signature="datasketch", threshold=0.6, **settings)
    assert kept_ids(directory_of(tmp_path, "a")) == kept_ids(directory_of(tmp_path, "b"))
    assert removed_rows(directory_of(tmp_path, "a")) == removed_rows(directory_of(tmp_path, "b"))
    assert len(removed_rows(directory_of(tmp_path, "a"))) > 20
