from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from operators import shards, tables
from operators.stage import StageContext
from operators.tokens import bpe, pack
from operators.tokens.encode import Encoder, TokenizerFiles
from operators.tokens.holdout import is_held_out
from operators.tokens.pack import pack_stage
from operators.tokens.window import spans
from pipelines.stages.tokens import PackStage
from tests.operators.tokens.build import bilingual, context, corpus

ROOT = Path(__file__).resolve().parents[3]
ROWS = bilingual(400)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.json").write_text(bpe.train(iter([[row["text"] for row in ROWS]]), 450).to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps(bpe.settings()))
    return TokenizerFiles.load(str(directory))


def packed(ctx: StageContext) -> pa.Table:
    manifest = shards.load_manifest(ctx.directory)
    return pa.concat_tables([pq.read_table(os.path.join(ctx.directory, part["name"])) for part in manifest.parts])


def run(root: Path, rows: list[dict[str, Any]], tokenizer: TokenizerFiles, **options: Any) -> StageContext:
    parts, workers = options.pop("part_rows", [100]), options.pop("workers", 2)
    source = corpus(root, "docs", rows, parts)
    ctx = context(root, "pack", {"docs": source}, workers=workers)
    pack_stage(ctx, [source], tokenizer, **{"length": 64, "window_documents": 50, **options})
    return ctx


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("method", ["best_fit", "concatenate"])
def test_rows_are_the_same_for_any_parts_units_and_workers(tmp_path: Path, tokenizer: TokenizerFiles, method: str) -> None:
    one = run(tmp_path / "a", ROWS, tokenizer, part_rows=[400], unit_windows=8, workers=1, method=method, holdout=0.1)
    two = run(tmp_path / "b", ROWS, tokenizer, part_rows=[13, 1, 130, 7], unit_windows=1, workers=2, method=method, holdout=0.1)
    three = run(tmp_path / "c", ROWS, tokenizer, part_rows=[13, 1, 130, 7], unit_windows=1, workers=1, method=method, holdout=0.1)
    assert packed(one).equals(packed(two))
    for name in ("tokens.bin", "tokens.json", "boundaries.bin", "boundary_offsets.bin"):
        assert Path(one.directory, name).read_bytes() == Path(two.directory, name).read_bytes()
    names = sorted(path.name for path in Path(two.directory, "parts").iterdir())
    assert names == sorted(path.name for path in Path(three.directory, "parts").iterdir())
    stats = [shards.load_manifest(ctx.directory).stats for ctx in (one, two, three)]
    assert stats[0] == stats[1] == stats[2]


@pytest.mark.usefixtures("ray_cluster")
def test_each_document_is_traced_to_its_sequences_and_back_to_its_text(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    ctx = run(tmp_path, ROWS, tokenizer, holdout=0.1)
    table = packed(ctx)
    assert table.schema.equals(tables.TOKENS)
    assert table["sequence"].to_pylist() == list(range(table.num_rows))
    pieces: dict[str, list[tuple[int, list[int]]]] = {}
    facts: dict[str, tuple[str, str]] = {}
    for row in table.to_pylist():
        bounds = row["cu_seqlens"]
        assert bounds[0] == 0
        assert row["loss_spans"] == [0, bounds[-1]]
        assert row["tokens"][bounds[-1] :] == [1] * (64 - bounds[-1])
        for index, document in enumerate(row["documents"]):
            pieces.setdefault(document, []).append((row["offsets"][index], row["tokens"][bounds[index] : bounds[index + 1]]))
            facts[document] = row["sources"][index], row["langs"][index]
    encoder = Encoder(tokenizer.model)
    held_out = dict(zip([row["id"] for row in ROWS], is_held_out([row["id"] for row in ROWS], 17, 0.1), strict=True))
    assert any(held_out.values())
    for row in ROWS:
        if not row["text"] or held_out[row["id"]]:
            assert row["id"] not in pieces
            continue
        tokens: list[int] = []
        for offset, piece in sorted(pieces[row["id"]]):
            assert offset == len(tokens)
            tokens += piece
        assert tokens[-1] == 0
        assert encoder.decode(tokens) == row["text"]
        assert facts[row["id"]] == (row["source"], row["lang"])


@pytest.mark.usefixtures("ray_cluster")
def test_the_account_balances_and_what_was_set_aside_is_listed(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    ctx = run(tmp_path, ROWS, tokenizer, holdout=0.1, max_document_tokens=100)
    manifest = shards.load_manifest(ctx.directory)
    stats = manifest.stats
    empty = sum(not row["text"] for row in ROWS)
    aside = sum(bool(row["text"]) and out for row, out in zip(ROWS, is_held_out([row["id"] for row in ROWS], 17, 0.1), strict=True))
    assert stats["set_aside"] == {"empty": empty, "held_out": aside}
    assert stats["documents"] == 400 == stats["packed"] + empty + aside
    assert stats["tokens_cut"] > 0
    assert stats["tokens"] == sum(stats["languages"].values()) == sum(stats["sources"].values())
    assert stats["sequences"] * 64 == stats["tokens"] + stats["padding_tokens"]
    assert manifest.rows == stats["sequences"] == manifest.ledger.kept
    assert [sum(equation["left"].values()) - sum(equation["right"].values()) for equation in manifest.equations] == [0] * 4
    rejects = pa.concat_tables([pq.read_table(os.path.join(ctx.directory, part["name"])) for part in manifest.rejects])
    assert rejects.schema.equals(tables.REJECTS)
    assert rejects.num_rows == empty + aside
    assert set(rejects["reason"].to_pylist()) == {"empty", "held_out"}
    table = packed(ctx)
    assert max(pc.max(pc.list_flatten(table["offsets"])).as_py(), 0) < 100


@pytest.mark.usefixtures("ray_cluster")
def test_the_flat_twin_holds_what_the_parts_hold(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    ctx = run(tmp_path, ROWS, tokenizer)
    table = packed(ctx)
    files = shards.load_manifest(ctx.directory).files
    index = json.loads(Path(ctx.directory, files["index"]).read_bytes())
    assert index["dtype"] == "uint16"
    assert (index["length"], index["eos_token_id"], index["padding_token_id"]) == (64, 0, 1)
    tokens = np.memmap(os.path.join(ctx.directory, files["tokens"]), index["dtype"], "r").reshape(index["sequences"], 64)
    assert np.array_equal(tokens, np.array(table["tokens"].to_pylist()))
    offsets = np.fromfile(os.path.join(ctx.directory, index["boundary_offsets"]), "<i8")
    boundaries = np.fromfile(os.path.join(ctx.directory, index["boundaries"]), "<i4")
    assert len(offsets) == index["sequences"] + 1
    assert [boundaries[a:b].tolist() for a, b in pairwise(offsets)] == table["cu_seqlens"].to_pylist()
    assert Path(ctx.directory, files["tokenizer"]).read_bytes() == tokenizer.model


@pytest.mark.usefixtures("ray_cluster")
def test_removed_documents_and_absent_language_columns_are_read_through(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    rows = [row for row in ROWS if row["text"]]
    first = corpus(tmp_path, "first", rows[:150], [40], columns=("id", "text", "source"))
    second = corpus(tmp_path, "second", rows[150:], [90])
    removed = np.zeros(150, bool)
    removed[[0, 39, 40, 77, 149]] = True
    view_directory = str(tmp_path / "clean" / "f0")
    view, position = [], 0
    for part in shards.parts([first]):
        mask = removed[position : position + part.rows]
        view.append(
            {
                "path": shards.relative_to_run(view_directory, part.path),
                "rows": part.rows,
                "removed": shards.save_bitmap(view_directory, len(view), mask),
                "removed_rows": int(mask.sum()),
            }
        )
        position += part.rows
    shards.finish(view_directory, stage="clean", kind="dedup", fingerprint="f0", config={}, inputs={}, view=view)
    ctx = context(tmp_path, "pack", {"clean": view_directory, "second": second})
    pack_stage(ctx, [view_directory, second], tokenizer, length=64, window_documents=32)
    documents = set(pc.list_flatten(packed(ctx)["documents"]).to_pylist())
    kept = [row["id"] for row, gone in zip(rows[:150], removed, strict=True) if not gone] + [row["id"] for row in rows[150:]]
    assert documents == set(kept)
    assert shards.load_manifest(ctx.directory).stats["languages"][""] > 0


@pytest.mark.usefixtures("ray_cluster")
def test_nothing_left_to_pack_is_an_error_that_says_so(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    with pytest.raises(ValueError, match="no document of"):
        run(tmp_path, [{"id": "a", "text": "", "source": "s"}], tokenizer)
    nameless = TokenizerFiles(tokenizer.model, {})
    with pytest.raises(ValueError, match="eos_token"):
        run(tmp_path / "b", ROWS[:3], nameless)


@pytest.mark.parametrize("most", [1, 300, 5000])
def test_a_window_of_huge_documents_is_packed_early_at_the_same_documents(
    tmp_path: Path, tokenizer: TokenizerFiles, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(pack, "_MOST_WINDOW_TOKENS", most)
    settings = pack.PackSettings(length=32, eos_token_id=0, padding_token_id=1, window_documents=64)
    made = []
    for name, part_rows in (("a", [400]), ("b", [13, 1, 130, 7])):
        (span,) = spans(shards.parts([corpus(tmp_path / name, "docs", ROWS, part_rows)]), 64, 100)
        writer = shards.UnitWriter(str(tmp_path / name / "out"), 0)
        ledger, stats = pack.pack_span(span, Encoder(tokenizer.model), settings, writer)
        record = writer.commit(ledger, stats)
        paths = [tmp_path / name / "out" / part["name"] for part in record["parts"]]
        made.append(pa.concat_tables([pq.read_table(path) for path in paths]))
        assert stats["tokens"] == stats["tokens_in"]
    assert made[0].equals(made[1])


def test_a_pack_stage_names_one_tokenizer() -> None:
    assert PackStage(input=["a", "b"], tokenizer="bpe", length=64).input_names() == ["a", "b", "bpe"]
    with pytest.raises(ValueError, match="either `tokenizer`"):
        PackStage(input="a", length=64)


SCRIPT = """
import sys
import ray
from operators.tokens.encode import TokenizerFiles
from operators.tokens.pack import pack_stage
from operators.tokens.window import spans
from pathlib import Path
from tests.operators.tokens.build import context

root, tokenizer = Path(sys.argv[1]), sys.argv[2]
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
source = str(root / "docs" / "f0")
ctx = context(root, "pack", {"docs": source})
ctx.progress = lambda done, total, note: print("progress", done, total, flush=True)
pack_stage(ctx, [source], TokenizerFiles.load(tokenizer), length=64, window_documents=25, unit_windows=1)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_pack_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    place = tmp_path / "tokenizer"
    place.mkdir()
    (place / "tokenizer.json").write_bytes(tokenizer.model)
    (place / "tokenizer_config.json").write_text(json.dumps(tokenizer.settings))
    calm = run(tmp_path / "calm", ROWS, tokenizer, window_documents=25, unit_windows=1)
    root = tmp_path / "killed"
    corpus(root, "docs", ROWS, [100])
    script = tmp_path / "pack_alone.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(root), str(place)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("progress") and int(line.split()[1]) >= 4:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    time.sleep(0.5)
    directory = root / "pack" / "f1"
    assert not (directory / "manifest.json").exists()
    committed = {path.name: path.stat().st_mtime_ns for path in (directory / ".scratch" / "windows" / "units").iterdir()}
    assert len(committed) >= 4
    ctx = context(root, "pack", {"docs": str(root / "docs" / "f0")})
    seen: list[int] = []
    ctx.progress = lambda done, total, note: seen.append(done)
    pack_stage(ctx, [str(root / "docs" / "f0")], tokenizer, length=64, window_documents=25, unit_windows=1)
    assert len(seen) <= 2 * 16 + 1 - len(committed) + 2
    for name in ("parts", "rejects"):
        calm_files = {path.name: path.read_bytes() for path in Path(calm.directory, name).iterdir()}
        assert {path.name: path.read_bytes() for path in Path(directory, name).iterdir()} == calm_files
    assert (directory / "tokens.bin").read_bytes() == Path(calm.directory, "tokens.bin").read_bytes()
    assert json.loads((directory / "manifest.json").read_bytes())["stats"] == shards.load_manifest(calm.directory).stats
