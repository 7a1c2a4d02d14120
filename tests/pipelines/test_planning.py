"""What a recipe would need and take: sizes of inputs, rows handed from stage to stage, results of earlier runs, the command."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import storage
from cluster.plan import Estimate
from operators import shards, tables
from operators.config import SettingsError
from operators.dedup.options import DedupOptions
from operators.dedup.plan import partitions_for
from operators.ledger import Ledger
from operators.sources.units import ReadSettings, plan_units
from pipelines import cli, stages
from pipelines.graph import plan as plan_graph
from pipelines.planning import data_stages, estimate, models, show, texts
from pipelines.planning.flow import Flow, Walk
from pipelines.planning.inputs import input_size
from pipelines.recipe import Recipe, parse_recipe
from tests.cluster.object_store import BUCKET, Line
from train.model_shapes import read_shape

RATES = show.load_rates(None)


def recipe(**named: dict[str, Any]) -> Recipe:
    return parse_recipe(yaml.safe_dump({"name": "trial", "stages": named}, allow_unicode=True))


def estimated(found: Recipe, base: Path, limit: int | None = None) -> dict[str, Estimate]:
    return {each.name: each for each in estimate.estimates(found, str(base / "runs"), str(base), RATES, limit)}


def jsonl(path: Path, rows: int, text: str = "A turbine turns in the wind. " * 10) -> None:
    data = "".join(json.dumps({"id": f"{number}", "text": text}, ensure_ascii=False) + "\n" for number in range(rows)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


CORPUS = {"kind": "corpus", "read": {"path": "pages.jsonl"}}
PACKED = {
    "pages": CORPUS,
    "clean": {"kind": "dedup", "input": "pages"},
    "bpe": {"kind": "tokenizer", "input": "clean", "vocab_size": 4000},
    "tokens": {"kind": "pack", "input": "clean", "tokenizer": "bpe", "length": 512},
    "base": {"kind": "pretrain", "input": "tokens", "tokens": 100_000, "model": {"layers": 2, "hidden": 64, "heads": 2}},
}


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([".jsonl", ".jsonl.gz"]), st.integers(200, 20_000)
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_the_units_of_a_corpus_stage_are_those_of_its_own_planner(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], ending: str, most: int
) -> None:
    folder = tmp_path_factory.mktemp("units")
    for number, count in enumerate(rows):
        jsonl(folder / f"{number}{ending}", count)
    read = {"path": f"*{ending}", "max_unit_bytes": most}
    found = estimated(recipe(pages={"kind": "corpus", "read": read}), folder)["pages"]
    real = plan_units(ReadSettings.model_validate(read), str(folder))
    assert found.phases[0].units == len(real)
    assert found.rows_in == pytest.approx(sum(rows))


def test_units_planned_without_keys_are_cut_the_same(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", 100)
    read = ReadSettings.model_validate({"path": "*.jsonl", "max_unit_bytes": 4000})
    cuts = [[(unit.index, unit.path, unit.start, unit.stop) for unit in plan_units(read, str(tmp_path), keyed=keyed)]
            for keyed in (True, False)]  # fmt: skip
    assert cuts[0] == cuts[1]


def test_rows_of_a_large_compressed_file_are_told_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl.gz"
    data = "".join(
        json.dumps({"id": str(n), "text": f"{n * 7919} 风力发电机 {n * 104729} wind " * 9}) + "\n" for n in range(60_000)
    )
    path.write_bytes(gzip.compress(data.encode(), 1))
    assert path.stat().st_size > 1 << 20
    size = input_size(ReadSettings.model_validate({"path": path.name}), str(tmp_path), None)
    assert size.rows == pytest.approx(60_000, rel=0.05)
    assert size.raw_bytes == pytest.approx(len(data.encode()), rel=0.05)
    assert size.chinese > 0.2


def test_rows_and_bytes_of_parquet_come_from_its_footers(tmp_path: Path) -> None:
    texts_ = [f"{number} " * 50 for number in range(1000)]
    pq.write_table(pa.table({"id": [str(n) for n in range(1000)], "text": texts_}), tmp_path / "a.parquet", use_dictionary=False)
    size = input_size(ReadSettings.model_validate({"path": "a.parquet"}), str(tmp_path), None)
    assert size.rows == 1000
    assert size.text_bytes == pytest.approx(sum(map(len, texts_)), rel=0.05)


def test_missing_files_make_a_stage_and_those_after_it_unknown_and_nothing_is_guessed(tmp_path: Path) -> None:
    found = estimated(recipe(**PACKED), tmp_path)
    assert "no file matches" in str(found["pages"].unknown)
    assert found["clean"].unknown == found["tokens"].unknown == "input"
    assert found["base"].unknown is None  # its tokens are in the recipe
    assert found["base"].tokens == 25 * 8 * 512


def test_rows_are_handed_from_stage_to_stage(tmp_path: Path) -> None:
    jsonl(tmp_path / "pages.jsonl", 2000)
    once = estimated(recipe(**PACKED), tmp_path)
    jsonl(tmp_path / "pages.jsonl", 4000)
    twice = estimated(recipe(**PACKED), tmp_path)
    for name in ("pages", "clean"):
        assert twice[name].rows_out == pytest.approx(2 * once[name].rows_out, rel=1e-3)
    assert twice["tokens"].tokens == pytest.approx(2 * once["tokens"].tokens, rel=1e-3)
    assert dict(once["clean"].assumed)["kept"] == 1 - RATES.assumptions.duplicates


def test_deduplication_is_cut_into_as_many_partitions_as_its_own_plan_has(tmp_path: Path) -> None:
    jsonl(tmp_path / "pages.jsonl", 500)
    units = {phase.name: phase.units for phase in estimated(recipe(**PACKED), tmp_path)["clean"].phases}
    assert units["join"] == partitions_for(500, DedupOptions.model_validate({})) == 1
    assert set(units) == {"map", "index", "join", "resolve", "cards", "remove", "examples"}
    checked = {**PACKED, "clean": {"kind": "dedup", "input": "pages", "verify": True, "partitions": 7}}
    units = {phase.name: phase.units for phase in estimated(recipe(**checked), tmp_path)["clean"].phases}
    assert (units["candidates"], units["shingles"], units["join"]) == (7, 1, 7)


@pytest.mark.parametrize(
    ("terabytes", "partitions", "last_step_gb", "minutes"), [(1, 835, 5, 4), (10, 4096, 50, 44), (100, 4096, 495, 439)]
)
def test_deduplication_at_scale_is_what_the_page_on_scale_has(
    terabytes: int, partitions: int, last_step_gb: float, minutes: float
) -> None:
    found = recipe(pages=CORPUS, clean={"kind": "dedup", "input": "pages", "bands": 14, "rows": 8, "similarity": False})
    walk = Walk(found, RATES, ".")
    walk.flows["pages"] = Flow(rows=terabytes * 0.25e9, text=terabytes * 1e12, parts=terabytes * 1250)
    planned, _ = data_stages.dedup("clean", found.stages["clean"], walk)
    phases = {phase.name: phase for phase in planned.phases}
    assert phases["join"].units == partitions
    assert planned.shuffled_bytes == pytest.approx(terabytes * 66e9)
    assert phases["resolve"].memory == pytest.approx(last_step_gb * 1e9, rel=0.1)
    assert phases["resolve"].core_seconds == pytest.approx(minutes * 60, rel=0.1)


def finish(directory: str, stage: str, kept: int, rejected: int) -> None:
    """A finished corpus stage of `kept` rows."""
    writer = shards.UnitWriter(directory, 0)
    ids = [str(number) for number in range(kept)]
    writer.write(pa.table({"id": ids, "text": ["a kept text " * 20] * kept, "source": ["web"] * kept}))
    writer.reject(tables.rejects_table([{"id": f"r{n}", "operator": "x", "reason": "y"} for n in range(rejected)]))
    ledger = Ledger(rows_in=kept + rejected, kept=kept)
    ledger.rejected["x:y"] = rejected
    writer.commit(ledger)
    shards.finish(directory, stage=stage, kind="corpus", fingerprint="f", config={}, inputs={})


def test_a_finished_stage_is_taken_as_it_is(tmp_path: Path) -> None:
    jsonl(tmp_path / "pages.jsonl", 1000)
    found = recipe(**PACKED)
    nodes = plan_graph(found, str(tmp_path / "runs" / "trial"), str(tmp_path), None)
    finish(nodes[0].directory, "pages", 77, 923)
    planned = estimated(found, tmp_path)
    assert planned["pages"].done
    assert planned["pages"].rows_out == planned["clean"].rows_in == 77


def test_a_trial_run_gives_the_shares_that_are_otherwise_assumed(tmp_path: Path) -> None:
    jsonl(tmp_path / "pages.jsonl", 1000)
    finish(str(tmp_path / "runs" / "trial-limit-20" / "pages" / "other"), "pages", 5, 15)
    planned = estimated(recipe(**PACKED), tmp_path)["pages"]
    assert not planned.done
    assert planned.rows_out == pytest.approx(250)
    assert dict(planned.measured)["kept"] == 0.25
    assert not planned.assumed or set(dict(planned.assumed)) == {"stored_text"}


def test_a_trial_is_planned_with_its_limit(tmp_path: Path) -> None:
    jsonl(tmp_path / "pages.jsonl", 1000)
    planned = estimated(recipe(**PACKED), tmp_path, limit=20)
    assert planned["pages"].rows_in == 20
    assert planned["base"].tokens == 20 * 8 * 512


def test_inputs_and_runs_in_an_object_store_are_planned_like_local_ones(line: Line, tmp_path: Path) -> None:
    root = f"s3://{BUCKET}/planning"
    jsonl(tmp_path / "pages.jsonl.gz", 300)
    storage.write_bytes(f"{root}/in/a.jsonl.gz", (tmp_path / "pages.jsonl.gz").read_bytes())
    finish(f"{root}/runs/trial-limit-20/pages/other", "pages", 5, 15)
    found = recipe(pages={"kind": "corpus", "read": {"path": f"{root}/in/*.jsonl.gz"}})
    planned = estimate.estimates(found, f"{root}/runs", str(tmp_path), RATES)[0]
    assert (planned.rows_in, planned.phases[0].units) == (300, 1)
    assert planned.rows_out == pytest.approx(75)


def test_every_kind_of_stage_has_an_estimate() -> None:
    assert set(estimate._ESTIMATORS) == set(stages.STAGES)


@pytest.mark.parametrize(
    ("name", "parameters", "active"), [("7b", 6.74e9, 6.74e9), ("70b", 70.6e9, 70.6e9), ("30b-a3b", 30.5e9, 3.3e9)]
)
def test_models_are_as_large_as_their_papers_say(name: str, parameters: float, active: float) -> None:
    vocab = 151_936 if "a3b" in name else 32_000 if name == "7b" else 128_256
    model = models.of_shape(read_shape(f"shape:{name}"), vocab)
    assert model.parameters == pytest.approx(parameters, rel=0.02)
    assert model.active == pytest.approx(active, rel=0.12)


def test_a_cap_on_generated_tokens_bounds_what_is_planned(tmp_path: Path) -> None:
    jsonl(tmp_path / "pages.jsonl", 1000)
    asking = {"kind": "generate", "input": "pages", "prompt": {"user": "$text"}, "max_generated_tokens": 500}
    planned = estimated(recipe(pages=CORPUS, labels=asking), tmp_path)["labels"]
    assert planned.generation is not None
    assert planned.generation.completion_tokens == 500


def test_an_endpoint_has_tokens_and_no_duration(tmp_path: Path) -> None:
    jsonl(tmp_path / "pages.jsonl", 100)
    generator = {"model": "m", "endpoint": {"url": "http://127.0.0.1:1/v1"}}
    asking = {"kind": "generate", "input": "pages", "prompt": {"user": "$text"}, "generator": generator}
    planned = estimated(recipe(pages=CORPUS, labels=asking), tmp_path)["labels"]
    assert planned.unknown == "endpoint"
    assert planned.tokens


def test_rates_that_are_written_are_read_again(tmp_path: Path) -> None:
    show.write_rates(RATES, str(tmp_path / "rates.yaml"))
    assert show.load_rates(str(tmp_path / "rates.yaml")) == RATES


def test_a_wrong_key_and_an_unknown_profile_are_refused_with_the_nearest_valid_one(tmp_path: Path) -> None:
    spec = {"name": "x", "nodes": [{"cpu": 4, "cpus": 4, "memory_gb": 8, "disk_gb": 10}], "storage": {"kind": "local"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(SettingsError, match="did you mean 'cpus'"):
        show.load_cluster(str(tmp_path / "c.yaml"))
    with pytest.raises(SettingsError, match="did you mean '8xa100'"):
        show.load_cluster("8xa10")


def test_every_text_exists_in_both_languages_with_the_same_facts() -> None:
    import string

    for known in (texts.TITLES, texts.WORDS, texts.WARNINGS, texts.REASONS):
        for code, pair in known.items():
            named = [{field for _, field, _, _ in string.Formatter().parse(text) if field} for text in pair]
            assert named[0] == named[1], code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "pages.jsonl", 300)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"name": "trial", "stages": PACKED}))
    return tmp_path


def test_the_command_prints_a_table_in_the_language_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "recipe.yaml", "--lang", "en"]) == 0
    english = capsys.readouterr().out
    assert "shuffled" in english
    assert "assumed" in english
    assert cli.main(["plan", "recipe.yaml", "--lang", "zh"]) == 0
    assert "交换数据" in capsys.readouterr().out


def test_the_command_gives_every_number_as_json_and_a_warning_decides_when_strict(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "recipe.yaml", "--cluster", "64cpu", "--json", "--strict"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in found["stages"]] == list(PACKED)
    assert [warning["code"] for warning in found["warnings"]] == ["runs_local"]
    assert found["workers"] == 64 * 32
