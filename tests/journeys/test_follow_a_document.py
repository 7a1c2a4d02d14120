"""One document's way from the file it came in to the packed sequence that holds it, with nothing but what a user has."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer

from operators import shards
from pipelines.cli import main
from pipelines.trace import trace
from tests.conftest import ROOT
from train.loader import PackedTokens


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """The corpus half of the quickstart on its first 250 rows a read."""
    directory = tmp_path_factory.mktemp("journey")
    recipe = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
    names = ["judge", "web", "docs", "clean", "bpe", "tokens"]
    recipe["stages"] = {name: recipe["stages"][name] for name in names}
    recipe["stages"]["bpe"]["vocab_size"] = 1500
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["run", str(directory / "recipe.yaml"), "--runs", str(directory / "runs"), "--limit", "250"]) == 0
    return directory / "runs" / "quickstart-limit-250"


def stage(run: Path, name: str) -> tuple[str, shards.Manifest]:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    directory = str(run / record["stages"][name]["directory"])
    return directory, shards.load_manifest(directory)


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    directory, manifest = stage(run, name)
    return [row for part in manifest.parts for row in pq.read_table(f"{directory}/{part['name']}").to_pylist()]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_document_is_found_again_in_the_packed_tokens_that_training_reads(run: Path, lang: str, example_data: Path) -> None:
    directory, manifest = stage(run, "tokens")
    index = json.loads((Path(directory) / manifest.files["index"]).read_text(encoding="utf-8"))
    tokens = np.memmap(Path(directory) / manifest.files["tokens"], dtype=index["dtype"], mode="r")
    tokens = tokens.reshape(index["sequences"], index["length"])
    tokenizer = Tokenizer.from_file(str(Path(directory) / manifest.files["tokenizer"]))
    source = {row["id"]: row["text"] for row in pq.read_table(example_data / "documents.parquet").to_pylist()}
    cleaned = {row["id"]: row for row in rows(run, "docs") if row["lang"] == lang and row["id"] in source}
    packed = {document for row in rows(run, "tokens") for document in row["documents"]}
    document = next(row_id for row_id in sorted(cleaned) if row_id in packed)

    events = {event.stage: event for event in trace(str(run), document)}
    assert events["docs"].what == "kept"
    assert events["tokens"].what == "packed"
    pieces = []
    for event in trace(str(run), document):
        found = re.match(r"sequence (\d+) tokens (\d+)\.\.(\d+) \(its tokens (\d+)\.\.", event.detail)
        if event.stage == "tokens" and found:
            sequence, first, last, offset = map(int, found.groups())
            pieces.append((offset, tokens[sequence, first : last + 1].tolist()))
    ids = [token for _, piece in sorted(pieces) for token in piece]
    assert ids[-1] == index["eos_token_id"]
    assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == cleaned[document]["text"]
    words = re.findall(r"\w{4,}", cleaned[document]["text"])[:5]
    assert words
    assert all(word in source[document] or word.startswith("pii") for word in words)


def test_every_ledger_balances_and_every_input_row_has_one_fate(run: Path) -> None:
    for name in ("web", "docs", "clean", "judge", "bpe", "tokens"):
        directory, manifest = stage(run, name)
        manifest.ledger.check(name)
        assert sum(pq.read_metadata(f"{directory}/{part['name']}").num_rows for part in manifest.parts) == sum(
            part["rows"] for part in manifest.parts
        )
    for name in ("web", "docs"):
        directory, manifest = stage(run, name)
        assert manifest.ledger.rows_in == 250
        rejected = sum(part["rows"] for part in manifest.rejects)
        assert rejected == manifest.ledger.rejected.total() + manifest.ledger.quarantined
        funnel = manifest.stats["funnel"]
        steps = [funnel[key] for key in sorted(funnel)]
        assert all(step["in"] == step["kept"] + sum(step["rejected"].values()) for step in steps)
        assert all(before["kept"] == after["in"] for before, after in itertools.pairwise(steps))
        assert steps[-1]["kept"] == manifest.ledger.kept
    kept = stage(run, "clean")[1].ledger
    assert kept.rows_in == stage(run, "web")[1].rows + stage(run, "docs")[1].rows
    tokens = stage(run, "tokens")[1]
    assert tokens.equations
    assert tokens.stats["documents"] == kept.kept


def test_a_removed_document_names_one_that_stayed(run: Path) -> None:
    directory, manifest = stage(run, "clean")
    names = manifest.files["removed"]
    removed = [
        row for name in ([names] if isinstance(names, str) else names) for row in pq.read_table(f"{directory}/{name}").to_pylist()
    ]
    assert len(removed) == manifest.ledger.rejected.total() > 0
    gone = {row["id"] for row in removed}
    for row in removed[:20]:
        assert row["kept_id"] not in gone
        events = trace(str(run), row["id"])
        assert any(event.what == "removed" and row["kept_id"] in event.detail for event in events)
        assert not any(event.what == "packed" for event in events)


def test_a_rejected_document_tells_by_what_and_why(run: Path) -> None:
    directory, manifest = stage(run, "web")
    rejects = [row for part in manifest.rejects for row in pq.read_table(f"{directory}/{part['name']}").to_pylist()]
    row = next(row for row in rejects if row["operator"] == "gopher_repetition")
    (event,) = trace(str(run), row["id"])
    assert event.what == "rejected"
    assert event.detail.startswith(f"gopher_repetition: {row['reason']} (measured ")
    assert row["text"]


def test_thresholds_are_replayed_from_the_measures_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decide", str(run)]) == 0
    told = capsys.readouterr().out
    assert told.count("the replay makes every decision of the stage again") == 2
    assert main(["decide", str(run), "--set", "docs.gopher_quality.min_words=200", "--json", "--address", "auto"]) == 0
    [decision] = json.loads(capsys.readouterr().out)
    kept = stage(run, "docs")[1].rows
    assert decision["kept"]["before"] == kept > decision["kept"]["after"]
    assert {lang for change in decision["changes"] for lang in change["languages"]} >= {"en", "zh"}


def test_the_same_command_again_finds_everything_done(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        recipe = run.parent.parent / "recipe.yaml"
        assert main(["run", str(recipe), "--runs", str(run.parent), "--limit", "250"]) == 0
    told = capfd.readouterr().err
    assert told.count("done before") == 6
    assert "starting Ray" not in told
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == before


@pytest.fixture(scope="module")
def taken_down(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A copy of the run without four documents: a packed one in each language, one that dedup removed, one rejected."""
    copy = tmp_path_factory.mktemp("takedown") / "runs" / run.name
    shutil.copytree(run, copy)
    packed = {document for row in rows(copy, "tokens") for document in row["documents"]}
    by_language = {lang: sorted(row["id"] for row in rows(copy, "docs") if row["lang"] == lang) for lang in ("en", "zh")}
    directory, clean = stage(copy, "clean")
    removed = [row["id"] for name in clean.files["removed"] for row in pq.read_table(f"{directory}/{name}").to_pylist()]
    directory, web = stage(copy, "web")
    rejected = pq.read_table(f"{directory}/{web.rejects[0]['name']}")["id"].to_pylist()
    gone = [next(row for row in by_language[lang] if row in packed) for lang in ("en", "zh")] + [removed[0], rejected[0]]
    assert main(["forget", str(copy), *gone, "--reason", "投诉 42"]) == 0
    return copy, gone


def test_a_document_that_is_taken_down_is_nowhere_and_everything_else_is_as_it_was(
    run: Path, taken_down: tuple[Path, list[str]], example_data: Path
) -> None:
    copy, gone = taken_down
    for name in ("web", "docs"):
        assert rows(copy, name) == [row for row in rows(run, name) if row["id"] not in gone]
        manifest = stage(copy, name)[1]
        manifest.ledger.check(name)
        assert manifest.stats["funnel"][max(manifest.stats["funnel"])]["kept"] == manifest.ledger.kept
    assert sum(stage(copy, name)[1].ledger.forgotten for name in ("web", "docs")) == len(gone)
    before, after = rows(run, "tokens"), rows(copy, "tokens")
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert new["documents"] == [document for document in old["documents"] if document not in gone]
        assert (old == new) == (old["documents"] == new["documents"])
    source = {row["id"]: row["text"] for row in pq.read_table(example_data / "documents.parquet").to_pylist()}
    parts = [pq.read_table(path).to_pylist() for path in copy.rglob("*.parquet")]
    everything = json.dumps(parts, ensure_ascii=False, default=str)
    for row_id in gone[:2]:
        words = max(source[row_id].splitlines(), key=len)[:60]
        assert json.dumps(words, ensure_ascii=False)[1:-1] not in everything
        assert [event.what for event in trace(str(copy), row_id)] == ["forgotten"]
        assert "投诉 42" in trace(str(copy), row_id)[0].detail


def test_after_a_takedown_the_run_is_done_its_measures_replay_and_training_reads_its_tokens(
    taken_down: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    copy, _ = taken_down
    assert main(["decide", str(copy)]) == 0
    assert capfd.readouterr().out.count("the replay makes every decision of the stage again") == 2
    tokens = PackedTokens(stage(copy, "tokens")[0])
    valid = sum(len(row["tokens"]) and row["cu_seqlens"][-1] - len(row["documents"]) for row in rows(copy, "tokens"))
    assert tokens.valid_tokens(np.arange(len(tokens))).sum() == valid
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        recipe = copy.parent.parent / "recipe.yaml"
        recipe.write_text(json.loads((copy / "run.json").read_text("utf-8"))["recipe_text"], encoding="utf-8")
        assert main(["run", str(recipe), "--runs", str(copy.parent), "--limit", "250"]) == 0
    assert capfd.readouterr().err.count("done before") == 6
