"""The stage on Ray: accounts, determinism, views of views, resume after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from operators import shards
from operators.dedup.reference import shingles
from tests.conftest import ROOT
from tests.operators.dedup.corpus import (
    bytes_below,
    directory_of,
    documents,
    kept_ids,
    removed_rows,
    run_stage,
    write_corpus,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")

OPTIONS = {"threshold": 0.6, "bands": 28, "rows": 4}


def test_one_of_each_family_stays_and_every_removed_row_names_it(tmp_path: Path) -> None:
    table = documents()
    source = write_corpus(tmp_path, "web", table, 40)
    manifest = run_stage(tmp_path, "clean", {"web": source}, **OPTIONS)
    directory = directory_of(tmp_path, "clean")
    kept, gone = kept_ids(directory), removed_rows(directory)

    families = [name.split("-")[0] for name in kept if name.startswith("f")]
    assert sorted(families) == sorted({name.split("-")[0] for name in table["id"].to_pylist() if name.startswith("f")})
    assert len([name for name in kept if name.startswith("empty")]) == 1
    assert len([name for name in kept if name.startswith("short")]) == 2  # "Too short!" differs in a byte and is too short
    assert kept == [name for name in table["id"].to_pylist() if name in set(kept)]

    rejected = {"exact:duplicate": 42, "minhash:near_duplicate": 80}
    assert manifest.ledger.to_json() == {"in": 165, "created": 0, "kept": 43, "rejected": rejected, "quarantined": 0}
    assert manifest.rows == len(kept) == 43
    assert len(gone) == 122
    texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    ids = table["id"].to_pylist()
    for row in gone:
        assert ids[row["ordinal"]] == row["id"]
        assert ids[row["match_ordinal"]] == row["match_id"]
        assert ids[row["kept_ordinal"]] == row["kept_id"]
        assert row["kept_id"] in kept
        assert row["id"].split("-")[0] == row["kept_id"].split("-")[0]
        if row["reason"] == "exact:duplicate":
            assert texts[row["id"]] == texts[row["match_id"]]
            assert row["similarity"] == 1.0
        else:
            a, b = (set(shingles(texts[row[side]])) for side in ("id", "match_id"))
            assert abs(row["similarity"] - len(a & b) / len(a | b)) < 0.2
    assert manifest.stats["documents"] == 165
    assert manifest.stats["duplicate_ids"] == 0
    assert manifest.stats["exact"] == {"removed": 42}
    assert manifest.stats["minhash"]["clusters"] == {"3": 40}
    assert manifest.stats["minhash"]["without_signature"] == 5
    examples = manifest.stats["examples"]
    assert len(examples) == 5
    assert all(texts[example["kept"]][:2000] == example["kept_text"] for example in examples)
    assert all(texts[example["removed"]][:2000] == example["removed_text"] for example in examples)
    assert not (directory / "keys").exists()
    assert not (directory / ".scratch").exists()


def test_workers_change_no_byte_and_partitions_and_part_sizes_no_row(tmp_path: Path) -> None:
    table = documents(20)
    source = write_corpus(tmp_path, "web", table, 30)
    run_stage(tmp_path, "two", {"web": source}, 2, **OPTIONS)
    manifest = run_stage(tmp_path, "one", {"web": source}, 1, **OPTIONS)
    two, one = (bytes_below(directory_of(tmp_path, name)) for name in ("two", "one"))
    assert {name: data.replace(b'"two"', b'"one"') for name, data in two.items()} == one

    split = run_stage(tmp_path, "split", {"web": source}, 2, partitions=7, **OPTIONS)
    assert {key: value for key, value in bytes_below(directory_of(tmp_path, "split")).items() if key != "manifest.json"} == {
        key: value for key, value in one.items() if key != "manifest.json"
    }
    other = write_corpus(tmp_path, "other", table, 11)
    recut = run_stage(tmp_path, "recut", {"other": other}, 2, partitions=2, **OPTIONS)
    assert removed_rows(directory_of(tmp_path, "recut")) == removed_rows(directory_of(tmp_path, "one"))
    assert kept_ids(directory_of(tmp_path, "recut")) == kept_ids(directory_of(tmp_path, "one"))
    assert manifest.stats == split.stats == recut.stats


def test_a_view_of_a_view_keeps_earlier_removals(tmp_path: Path) -> None:
    table = documents(12)
    first, second = write_corpus(tmp_path, "web", table.slice(0, 30), 20), write_corpus(tmp_path, "docs", table.slice(30), 20)
    exact = run_stage(tmp_path, "exact", {"web": first, "docs": second}, method="exact")
    assert exact.ledger.rejected == {"exact:duplicate": 14}
    near = run_stage(tmp_path, "near", {"exact": str(directory_of(tmp_path, "exact"))}, exact=False, **OPTIONS)
    assert near.ledger.to_json() == {
        "in": 39, "created": 0, "kept": 15, "rejected": {"minhash:near_duplicate": 24}, "quarantined": 0,
    }  # fmt: skip
    both = run_stage(tmp_path, "both", {"web": first, "docs": second}, method=["exact", "minhash"], **OPTIONS)
    assert kept_ids(directory_of(tmp_path, "near")) == kept_ids(directory_of(tmp_path, "both"))
    assert both.ledger.kept == near.rows == 15
    again = run_stage(tmp_path, "again", {"near": str(directory_of(tmp_path, "near"))}, **OPTIONS)
    assert again.ledger.kept == again.ledger.rows_in == 15
    assert kept_ids(directory_of(tmp_path, "again")) == kept_ids(directory_of(tmp_path, "near"))


def test_the_longest_or_the_best_can_stay(tmp_path: Path) -> None:
    table = documents(6)
    source = write_corpus(tmp_path, "web", table, 10)
    rows = {row["id"]: row for row in table.to_pylist()}
    run_stage(tmp_path, "longest", {"web": source}, keep="longest", **OPTIONS)
    run_stage(tmp_path, "best", {"web": source}, keep="best", **OPTIONS)
    for name, score in (("longest", lambda row: len(row["text"])), ("best", lambda row: row["quality"] or -1.0)):
        kept = kept_ids(directory_of(tmp_path, name))
        for chosen in [name for name in kept if name.startswith("f")]:
            family = [row for key, row in rows.items() if key.startswith(chosen.split("-")[0] + "-")]
            assert score(rows[chosen]) == max(map(score, family))
    longest = {row["id"]: row for row in removed_rows(directory_of(tmp_path, "longest"))}
    assert all(len(rows[row["kept_id"]]["text"]) >= len(rows[name]["text"]) for name, row in longest.items())


def test_verified_pairs_reach_the_threshold_and_chains_of_lesser_ones_break(tmp_path: Path) -> None:
    words = [f"{a}{b}" for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmno"]
    chain = [" ".join([*words[:200], *words[200 + 20 * i : 220 + 20 * i]]) for i in range(4)]
    close = " ".join(words[:100] + words[240:260]), " ".join([*words[:100], *words[240:259], "zz"])
    table = pa.table({"id": [f"d{i}" for i in range(6)], "text": [*chain, *close]})
    source = write_corpus(tmp_path, "web", table, 2)
    loose = run_stage(tmp_path, "loose", {"web": source}, threshold=0.9, bands=56, rows=2)
    strict = run_stage(tmp_path, "strict", {"web": source}, threshold=0.9, bands=56, rows=2, verify=True)
    assert loose.rows == 1
    assert kept_ids(directory_of(tmp_path, "strict")) == ["d0", "d1", "d2", "d3", "d4"]
    pairs = strict.stats["minhash"]["pairs"]
    assert pairs["checked"] > 0
    assert pairs["unchecked"] == 0
    split = run_stage(tmp_path, "split", {"web": source}, threshold=0.9, bands=56, rows=2, verify=True, partitions=5)
    assert split.stats == strict.stats


def test_duplicate_ids_are_counted_and_nothing_breaks(tmp_path: Path) -> None:
    table = documents(3)
    a, b = write_corpus(tmp_path, "web", table, 10), write_corpus(tmp_path, "docs", table, 10)
    manifest = run_stage(tmp_path, "clean", {"web": a, "docs": b}, **OPTIONS)
    assert manifest.stats["duplicate_ids"] == len(table)
    assert kept_ids(directory_of(tmp_path, "clean")) == [
        name for name in table["id"].to_pylist() if name in set(kept_ids(directory_of(tmp_path, "clean")))
    ]
    assert manifest.ledger.rows_in == 2 * len(table)


def test_an_input_without_rows_gives_an_empty_view(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, "web", documents(1).slice(0, 0), 10)
    manifest = run_stage(tmp_path, "clean", {"web": source}, verify=True)
    assert (manifest.rows, manifest.view, manifest.ledger.rows_in) == (0, [], 0)


def test_a_missing_column_is_named_with_its_file(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, "web", documents(1), 10)
    with pytest.raises(RuntimeError, match=r"map of .*parquet failed.*no column \['body'\]"):
        run_stage(tmp_path, "clean", {"web": source}, column="body")


DRIVER = """
import json, sys
from pathlib import Path
import ray
from pipelines.stages.dedup import DedupStage
from tests.operators.dedup.corpus import context_of
address, run, name, source, options = sys.argv[1:]
ray.init(address=address, log_to_driver=False, configure_logging=False)
context = context_of(Path(run), name, {"web": source})
context.progress = lambda done, total, note: print(done, total, flush=True)
DedupStage(input="web", **json.loads(options)).run(context)
"""


@pytest.mark.slow
def test_after_a_kill_the_stage_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, "web", documents(20), 5)
    undisturbed = run_stage(tmp_path, "calm", {"web": source}, partitions=6, **OPTIONS)
    address = ray.get_runtime_context().gcs_address
    units = 3 * len(shards.parts([source])) + 6 + 3
    arguments = [address, str(tmp_path), "shot", source, json.dumps({"partitions": 6, **OPTIONS})]
    directory, before = directory_of(tmp_path, "shot"), {}
    for moment in (units // 6, units * 3 // 4):
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        _follow(driver, moment)
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
        assert not (directory / "manifest.json").exists()
        written = {path: path.stat().st_ino for path in (directory / "keys" / "exact").glob("*.bin")}
        committed = {int(path.stem) for path in (directory / "keys" / "records" / "map").glob("*.json")}
        assert all(written[path] == file for path, file in before.items()), "a committed unit was done again"
        before = {path: file for path, file in written.items() if int(path.stem) in committed}
        assert len(before) >= moment // 4
    run_stage(tmp_path, "shot", {"web": source}, partitions=6, **OPTIONS)
    calm = {name: data.replace(b'"calm"', b'"shot"') for name, data in bytes_below(directory_of(tmp_path, "calm")).items()}
    assert bytes_below(directory) == calm
    assert undisturbed.rows == 23


def _follow(driver: subprocess.Popen[str], moment: int) -> None:
    """Read progress until `moment` units are done."""
    assert driver.stdout is not None
    other = []
    for line in driver.stdout:
        if not re.fullmatch(r"\d+ \d+\n", line):
            other.append(line)
        elif int(line.split()[0]) >= moment:
            return
    raise AssertionError("the driver ended before it was killed:\n" + "".join(other))
