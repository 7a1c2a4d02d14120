"""`danlu stats` on files and on stages."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.cli import main
from tests.operators.dedup.corpus import write_corpus


def test_files_and_a_stage_are_counted_and_unreadable_rows_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "丹炉"}\n{"text": "one two"}\n{oops\n', "utf-8")
    assert main(["stats", str(path), "--json", "--workers", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 2
    assert found["unreadable"] == {"bad_json": 1}
    assert found["languages"]["zh"]["characters"] == 2

    table = pa.table({"id": ["a", "b"], "text": pa.array(["丹炉", "one [two]"], pa.large_string()), "source": ["[red]s", "t"]})
    stage = write_corpus(tmp_path / "run", "web", table, 1)
    assert main(["stats", stage, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert ["rows", "2"] in [line.split() for line in printed.splitlines()]
    assert "[red]s" in printed


def test_an_unfinished_stage_and_a_missing_path_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "web" / "1").mkdir(parents=True)
    record = {"stages": {"web": {"directory": "web/1"}}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert main(["stats", str(tmp_path / "run" / "web")]) == 2
    assert "is not finished" in capsys.readouterr().err
    assert main(["stats", str(tmp_path / "nothing.jsonl")]) == 2
    assert "nothing.jsonl" in capsys.readouterr().err
