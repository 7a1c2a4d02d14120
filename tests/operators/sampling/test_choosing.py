"""Select and mix on Ray: exact amounts, accounts, the same rows whatever the parts and workers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators import shards
from operators.config import SettingsError, parse
from operators.stage import Stage
from pipelines.stages.sampling import MixStage, SelectStage
from tests.operators.dedup.corpus import bytes_below, context_of, directory_of, kept_ids, write_corpus

pytestmark = pytest.mark.usefixtures("ray_cluster")


def _documents(count: int = 600, name: str = "d") -> pa.Table:
    generator = np.random.default_rng(3)
    langs = ["zh" if index % 3 == 0 else "en" for index in range(count)]
    texts = [
        ("丹炉" if lang == "zh" else "alembic ") * int(size)
        for lang, size in zip(langs, generator.integers(1, 30, count), strict=True)
    ]
    quality = pa.array(np.round(generator.random(count), 2), mask=generator.random(count) < 0.05)
    columns = {"id": [f"{name}{index}" for index in range(count)], "text": pa.array(texts, pa.large_string())}
    return pa.table({**columns, "source": ["test"] * count, "lang": langs, "quality": quality})


def _run(run: Path, name: str, inputs: dict[str, str], kind: type[Stage], workers: int = 2, **options: Any) -> shards.Manifest:
    context = context_of(run, name, inputs, workers)
    parse(kind, {"kind": "select" if kind is SelectStage else "mix", **options}, name).run(context)
    return shards.load_manifest(context.directory)


def test_the_best_tenth_of_each_language_stays(tmp_path: Path) -> None:
    table = _documents()
    web = write_corpus(tmp_path, "web", table, 130)
    manifest = _run(tmp_path, "best", {"web": web}, SelectStage, input="web", scores={"quality": 1}, within=["lang"], fraction=0.1)
    kept = set(kept_ids(directory_of(tmp_path, "best")))
    rows = table.to_pylist()
    for lang, count in (("zh", 20), ("en", 40)):
        here = [row for row in rows if row["lang"] == lang]
        best = sorted((row["quality"] for row in here if row["quality"] is not None), reverse=True)
        mine = [row["quality"] for row in here if row["id"] in kept]
        assert sorted(mine, reverse=True) == best[:count]
    assert manifest.ledger.to_json() == {"in": 600, "created": 0, "kept": 60, "rejected": {"select:below": 540}, "quarantined": 0}
    assert manifest.stats["groups"]["zh"]["taken"] == {"documents": 20, "size": 20}
    gone = [row for name in manifest.files["removed"] for row in pq.read_table(directory_of(tmp_path, "best") / name).to_pylist()]
    known = {row["id"]: row["quality"] for row in rows}
    assert {row["id"]: row["value"] for row in gone} == {key: value for key, value in known.items() if key not in kept}
    assert all(rows[row["ordinal"]]["id"] == row["id"] for row in gone)


def test_other_parts_and_workers_choose_the_same_rows(tmp_path: Path) -> None:
    table, options = _documents(), {"input": "web", "scores": {"quality": 1}, "fraction": 0.3, "unit": "characters"}
    first = write_corpus(tmp_path / "a", "web", table, 600)
    second = write_corpus(tmp_path / "b", "web", table, 47)
    _run(tmp_path / "a", "best", {"web": first}, SelectStage, 1, **options)
    _run(tmp_path / "b", "best", {"web": second}, SelectStage, 4, **options)
    assert kept_ids(directory_of(tmp_path / "a", "best")) == kept_ids(directory_of(tmp_path / "b", "best"))
    again = tmp_path / "c"
    third = write_corpus(again, "web", table, 47)
    _run(again, "best", {"web": third}, SelectStage, 1, **options)
    assert bytes_below(directory_of(again, "best")) == bytes_below(directory_of(tmp_path / "b", "best"))


def test_a_sample_is_exact_and_does_not_look_at_the_text(tmp_path: Path) -> None:
    web = write_corpus(tmp_path, "web", _documents(), 100)
    manifest = _run(tmp_path, "some", {"web": web}, SelectStage, input="web", within=["lang"], amount=50)
    assert {name: group["taken"]["documents"] for name, group in manifest.stats["groups"].items()} == {"en": 50, "zh": 50}
    assert manifest.ledger.rejected == Counter({"select:not_drawn": 500})


def test_a_mixture_has_its_shares_and_repeats_what_is_scarce(tmp_path: Path) -> None:
    web = write_corpus(tmp_path, "web", _documents(600, "w"), 90)
    books = write_corpus(tmp_path, "books", _documents(60, "b"), 25)
    manifest = _run(
        tmp_path, "mixed", {"web": web, "books": books}, MixStage,
        input={"web": 0.7, "books": 0.3}, unit="characters", total=40_000, max_repeats=20,
    )  # fmt: skip
    groups = manifest.stats["groups"]
    assert groups["books"]["repeats"] > 2
    assert groups["web"]["repeats"] < 1
    longest = 30 * 8
    assert 0.7 * 40_000 - longest < groups["web"]["taken"]["size"] <= 0.7 * 40_000
    assert 0.3 * 40_000 - longest < groups["books"]["taken"]["size"] <= 0.3 * 40_000
    seen = Counter(kept_ids(directory_of(tmp_path, "mixed")))
    assert {count for name, count in seen.items() if name[0] == "w"} == {1}
    whole = int(groups["books"]["repeats"])
    assert {count for name, count in seen.items() if name[0] == "b"} <= {whole, whole + 1}
    ledger = manifest.ledger
    assert ledger.rows_in == 660
    assert ledger.kept == sum(seen.values())
    assert ledger.created == sum(count - 1 for count in seen.values())
    assert ledger.rejected == Counter({"mix:not_drawn": 660 - len(seen)})


def test_languages_are_evened_out_by_temperature_without_repeats(tmp_path: Path) -> None:
    web = write_corpus(tmp_path, "web", _documents(), 200)
    manifest = _run(tmp_path, "mixed", {"web": web}, MixStage, input="web", by=["lang"], temperature=1e9)
    assert {name: group["taken"]["documents"] for name, group in manifest.stats["groups"].items()} == {"en": 200, "zh": 200}


def test_what_cannot_be_mixed_is_refused_with_the_group_that_is_too_small(tmp_path: Path) -> None:
    web = write_corpus(tmp_path, "web", _documents(), 300)
    with pytest.raises(ValueError, match=r"would repeat 'zh' 1\.50 times"):
        _run(tmp_path, "mixed", {"web": web}, MixStage, input="web", by=["lang"], weights={"zh": 1, "*": 1}, total=600)
    with pytest.raises(ValueError, match=r"weights name \['ja'\]"):
        _run(tmp_path, "other", {"web": web}, MixStage, input="web", by=["lang"], weights={"ja": 1, "*": 1})
    with pytest.raises(KeyError, match="has no column"):
        _run(tmp_path, "none", {"web": web}, SelectStage, input="web", scores={"beauty": 1}, fraction=0.5)


def test_settings_that_contradict_each_other_are_refused() -> None:
    for options, message in (
        ({"kind": "select", "input": "a"}, "either `fraction` or `amount`"),
        ({"kind": "select", "input": "a", "fraction": 0.1, "unit": "tokens"}, "with `unit: tokens`"),
    ):
        with pytest.raises(SettingsError, match=message):
            parse(SelectStage, options, "stages.best")
    with pytest.raises(SettingsError, match="either weights or a `temperature`"):
        parse(MixStage, {"kind": "mix", "input": {"a": 1}, "temperature": 2.0}, "stages.mixed")
