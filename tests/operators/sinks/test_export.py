"""The export stage: files of one size, the same whatever the number of workers, and readable by others."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import shards, tables
from operators.config import SettingsError
from operators.ledger import Ledger
from operators.sinks.counts import merge_counts
from operators.sinks.export import ExportOptions, run_export, write_file
from operators.sinks.formats import make_sink
from operators.sinks.plan import plan_files
from operators.sinks.rows import Stretch, conform, joint_schema, read_stretch
from operators.stage import StageContext
from operators.supervise import Limits, Report, Task
from pipelines.recipe import parse_recipe

WORDS = ["语言模型", "训练", "数据", "corpus", "engine", "tokens", "去重", "filter", "\x00", "混合"]


def documents(first: int, count: int, seed: int = 0) -> pa.Table:
    chance = np.random.default_rng(seed + first)
    texts = [" ".join(chance.choice(WORDS, chance.integers(5, 200))) + f" {number}" for number in range(first, first + count)]
    return pa.table(
        {
            "id": [f"d{number}" for number in range(first, first + count)],
            "text": pa.array(texts, pa.large_string()),
            "source": [("wiki", "书籍")[number % 2] for number in range(first, first + count)],
            "url": pa.nulls(count, pa.string()),
            "lang": [("zh", "en", "")[number % 3] for number in range(first, first + count)],
            "license": ["CC0-1.0"] * count,
        }
    )


def write_stage(run: Path, name: str, units: list[pa.Table]) -> str:
    """A finished stage of one part a table."""
    directory = str(run / name / "f00d")
    for index, table in enumerate(units):
        writer = shards.UnitWriter(directory, index)
        for start in range(0, table.num_rows, 100):
            writer.write(table.slice(start, 100))
        writer.commit(Ledger(rows_in=table.num_rows + 1, kept=table.num_rows, rejected=Counter({"c4:short": 1})))
    shards.finish(directory, stage=name, kind="corpus", fingerprint="f00d", config={"read": {"path": "网页"}}, inputs={})
    return directory


def write_view(run: Path, name: str, source: str, removed: list[np.ndarray]) -> str:
    """A finished stage that removes rows of another, as dedup does."""
    directory, view = str(run / name / "beef"), []
    for index, (part, mask) in enumerate(zip(shards.parts([source]), removed, strict=True)):
        bitmap = shards.save_bitmap(directory, index, mask)
        path = shards.relative_to_run(directory, part.path)
        view.append({"path": path, "rows": part.rows, "removed": bitmap, "removed_rows": int(mask.sum())})
    kept = sum(int((~mask).sum()) for mask in removed)
    ledger = Ledger(rows_in=sum(map(len, removed)), kept=kept)
    ledger.rejected["dedup:near"] = ledger.rows_in - kept
    inputs = {"web": shards.relative_to_run(directory, source)}
    shards.finish(directory, stage=name, kind="dedup", fingerprint="beef", config={}, inputs=inputs, ledger=ledger, view=view)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str, pa.Table]:
    """(run directory, a stage of three parts, a view of it, the rows that the view keeps)."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    tables_ = [documents(0, 700), documents(700, 40), documents(740, 1200)]
    web = write_stage(run, "web", tables_)
    chance = np.random.default_rng(3)
    removed = [chance.random(table.num_rows) < 0.3 for table in tables_]
    removed[1][:] = True  # a part of which nothing is left
    clean = write_view(run, "clean", web, removed)
    kept = pa.concat_tables([table.filter(pa.array(~mask)) for table, mask in zip(tables_, removed, strict=True)])
    return run, web, clean, kept


def export(run: Path, name: str, source: str, workers: int = 2, **options: Any) -> tuple[Path, shards.Manifest]:
    directory = str(run / "out" / name)
    config = {"kind": "export", "input": "clean", **options}
    context = StageContext("out", "export", directory, name, config, {"clean": source}, 7, workers=workers, base_directory=str(run))
    run_export(context, ExportOptions(**options), [source], Limits())
    return Path(directory), shards.load_manifest(directory)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written in this process, the last one first."""

    def last_first(context: Any, target: str, units: list[dict[str, Any]], limits: Limits, **rest: Any) -> None:
        assert target == "operators.sinks.export:write_file"
        for unit in json.loads(json.dumps(units))[::-1]:
            write_file(Task(unit), Report(lambda message: None))

    monkeypatch.setattr("operators.sinks.export.run_units", last_first)


def file_digests(manifest: shards.Manifest) -> list[tuple[str, str]]:
    return [(entry["name"], entry["sha256"]) for entry in manifest.files["export"]["files"]]


def test_parquet_of_one_size_in_the_order_of_the_input_is_an_input_of_later_stages(
    here: None, run: tuple[Path, str, str, pa.Table]
) -> None:
    folder, _, clean, kept = run
    first, manifest = export(folder, "one", clean, target_bytes=20_000)
    sizes = [part["bytes"] for part in manifest.parts]
    assert len(sizes) >= 4
    assert max(sizes) < 1.6 * min(sizes)  # each file has a few kilobytes of footer and dictionaries besides its rows
    assert pa.concat_tables([pq.read_table(first / part["name"]) for part in manifest.parts]).equals(kept)
    assert manifest.ledger.to_json() == {"in": kept.num_rows, "created": 0, "kept": kept.num_rows, "rejected": {}, "quarantined": 0}
    # a later stage reads the compacted parts like any others
    read = [batch for part in shards.parts([str(first)]) for _, batch in shards.read(part, ["id"])]
    assert pa.Table.from_batches(read)["id"].to_pylist() == kept["id"].to_pylist()
    whole, large = export(folder, "large", clean)
    assert [part["rows"] for part in large.parts] == [kept.num_rows]
    assert pq.read_table(whole / large.parts[0]["name"]).equals(kept)


def test_workers_on_ray_write_the_same_bytes_as_one_process(
    ray_cluster: None, run: tuple[Path, str, str, pa.Table], request: pytest.FixtureRequest
) -> None:
    folder, _, clean, _ = run
    _, three = export(folder, "three", clean, workers=3, target_bytes=20_000)
    request.getfixturevalue("here")
    _, one = export(folder, "alone", clean, target_bytes=20_000)
    assert file_digests(three) == file_digests(one)


def test_a_hugging_face_folder_loads_with_the_datasets_library_and_its_card_says_how_it_was_made(
    here: None, run: tuple[Path, str, str, pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, _, clean, kept = run
    place = tmp_path / "published" / "语料"
    options = {"path": str(place), "format": "huggingface", "target_bytes": 20_000, "license": "cc0-1.0", "title": "中文语料"}
    _, manifest = export(folder, "hub", clean, **options)
    assert manifest.parts == []
    loaded = datasets.load_dataset(str(place), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == kept.num_rows
    assert loaded["text"][:] == kept["text"].to_pylist()
    card = (place / "README.md").read_text("utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["language"] == ["en", "zh"]
    assert (front["license"], front["pretty_name"]) == ("cc0-1.0", "中文语料")
    assert front["dataset_info"]["splits"][0]["num_examples"] == kept.num_rows
    assert [item["name"] for item in front["dataset_info"]["features"]] == kept.column_names
    books = sum(1 for source in kept["source"].to_pylist() if source == "书籍")
    for line in (
        f"| 书籍 | {books:,} |",
        f"| CC0-1.0 | {kept.num_rows:,} |",
        "| clean | dedup | `beef` |",
        "c4:short",
        "path: 网页",
    ):
        assert line in card
    names = [entry["name"] for entry in manifest.files["export"]["files"]]
    assert names[0] == f"data/train-00000-of-{len(names):05d}.parquet"


def test_an_earlier_export_is_replaced_and_a_folder_of_others_is_refused(
    here: None, run: tuple[Path, str, str, pa.Table], tmp_path: Path
) -> None:
    folder, web, clean, _ = run
    place = tmp_path / "out"
    export(folder, "p1", clean, path=str(place), format="jsonl.zst", target_bytes=30_000, columns=["text", "id"])
    before = sorted(path.name for path in (place / "data").iterdir())
    _, manifest = export(folder, "p2", web, path=str(place), format="jsonl.zst")
    assert len(before) > 1
    assert sorted(path.name for path in (place / "data").iterdir()) == ["part-00000-of-00001.jsonl.zst"]
    assert json.loads((place / "export.json").read_text())["complete"] is True
    assert sorted(path.name for path in place.iterdir()) == ["data", "export.json"]
    with pytest.raises(SettingsError, match=r"stage out cannot be an input: its rows lie in "):
        shards.parts([str(folder / "out" / "p2")])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match=r"no export has written \(notes.txt"):
        export(folder, "p3", clean, path=str(tmp_path / "mine"))
    assert manifest.files["export"]["files"][0]["rows"] == 1940


def test_an_export_that_was_stopped_goes_on_and_ends_with_the_same_files(
    here: None, run: tuple[Path, str, str, pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, clean, _ = run
    _, whole = export(folder, "whole", clean, target_bytes=20_000)
    half = folder / "out" / "half"
    done: list[str] = []

    def only_some(context: Any, target: str, units: list[dict[str, Any]], limits: Limits, **rest: Any) -> None:
        for unit in units[1:3]:
            write_file(Task(unit), Report(lambda message: None))
            done.append(unit["unit"]["path"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("operators.sinks.export.run_units", only_some)
        with pytest.raises(KeyboardInterrupt):
            export(folder, "half", clean, target_bytes=20_000)
    stamps = {name: (half / name).stat().st_mtime_ns for name in done}
    _, manifest = export(folder, "half", clean, target_bytes=20_000)
    assert file_digests(manifest) == file_digests(whole)
    assert {name: (half / name).stat().st_mtime_ns for name in done} == stamps


def jsonl_rows(path: Path) -> list[dict[str, Any]]:
    data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes())).read()
    return [json.loads(line) for line in data.decode("utf-8").split("\n") if line]


JSON = pa.schema([("text", pa.large_string()), ("n", pa.int64()), ("messages", pa.list_(pa.struct([("content", pa.string())])))])
ROW = st.tuples(st.text(max_size=30), st.none() | st.integers(-(2**63), 2**63 - 1), st.lists(st.text(max_size=30), max_size=3))


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, max_size=12))
def test_json_lines_give_back_any_text(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int | None, list[str]]]
) -> None:
    written = [{"text": text, "n": number, "messages": [{"content": item} for item in items]} for text, number, items in rows]
    path = tmp_path_factory.mktemp("json") / "a.jsonl.zst"
    sink = make_sink("jsonl.zst", str(path), JSON, 3)
    sink.write(pa.Table.from_pylist(written, JSON))
    sink.close()
    assert jsonl_rows(path) == written


def test_bytes_have_no_place_in_json() -> None:
    with pytest.raises(SettingsError, match="column 'content' of type large_binary cannot be written as JSON"):
        make_sink("jsonl.zst", "never", pa.schema([("content", pa.large_binary())]), 3)


PARTS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 100), st.floats(0, 1e6)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(parts=PARTS, target=st.integers(1, 10**6))
def test_every_row_is_planned_once_and_in_order(parts: list[tuple[int, int, float]], target: int) -> None:
    made, ordinal = [], 0
    for index, (rows, share, _) in enumerate(parts):
        made.append(shards.Part(f"p{index}", rows, ordinal, "bits", rows * share // 100))
        ordinal += rows
    plan = plan_files(made, np.array([size for _, _, size in parts]), target)
    planned = [(item.path, row) for file in plan for item in file for row in range(item.start, item.stop)]
    assert planned == [(part.path, row) for part in made if part.kept_rows for row in range(part.rows)]
    assert all(plan)


def test_parts_with_other_columns_share_one_schema(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "n": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": [2**40], "id": pa.array(["乙"], pa.large_string()), "lang": ["zh"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"id": pa.array([1.5])}), tmp_path / "c.parquet")
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    schema = joint_schema(paths)
    assert [(field.name, str(field.type)) for field in schema] == [("id", "large_string"), ("n", "int64"), ("lang", "string")]

    def rows() -> Iterator[pa.Table]:
        for path in paths:
            for batch in read_stretch(Stretch(path, 1, None, 0, 1), schema.names):
                yield conform(batch, schema)

    assert pa.concat_tables(rows()).to_pylist() == [{"id": "a", "n": 1, "lang": None}, {"id": "乙", "n": 2**40, "lang": "zh"}]
    with pytest.raises(SettingsError, match=r"c\.parquet: its columns do not fit"):
        joint_schema([*paths, str(tmp_path / "c.parquet")])


def test_counts_stay_bounded_and_lose_no_row() -> None:
    total: dict[str, Any] = {}
    for batch in range(60):
        total = merge_counts(total, {"sources": {f"s{batch}-{row}": 1 for row in range(1000)} | {"large": 5}})
    assert len(total["sources"]) <= 21_000
    assert sum(total["sources"].values()) == 60 * 1005
    assert total["sources"]["large"] == 300


def test_a_recipe_may_export_and_go_on_from_there() -> None:
    recipe = parse_recipe(
        """
        name: demo
        stages:
          web: {kind: corpus, read: {path: a.jsonl}}
          whole: {kind: export, input: web}
          clean: {kind: dedup, input: whole}
          hub: {kind: export, input: [clean], format: huggingface, path: out, target_bytes: 1000000}
        """
    )
    assert recipe.stages["clean"].input_names() == ["whole"]
    with pytest.raises(SettingsError, match=r"unknown key 'target_size'; did you mean 'target_bytes'"):
        parse_recipe("{name: demo, stages: {web: {kind: export, input: web, target_size: 3}}}")


def test_the_tables_of_synthesis_are_written_too(tmp_path: Path) -> None:
    row = {
        "id": "c",
        "messages": [{"role": "user", "content": "你好"}],
        "lang": "zh",
        "tools": None,
        "provenance": {"parents": ["a"]},
    }
    table = pa.Table.from_pylist([row], tables.CONVERSATIONS)
    sink = make_sink("jsonl.zst", str(tmp_path / "c.jsonl.zst"), table.schema, 3)
    sink.write(table)
    sink.close()
    assert jsonl_rows(tmp_path / "c.jsonl.zst")[0]["messages"] == row["messages"]
