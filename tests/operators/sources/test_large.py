"""Large documents and files in bounded memory, each read in a process of its own whose peak is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

READ = """
import json, re, sys
from operators.corpus import run_unit
from operators.sources import ReadSettings, plan_units
from operators.supervise import Report, Task
read = ReadSettings(**json.loads(sys.argv[1]))
kept = 0
for unit in plan_units(read, sys.argv[2]):
    given = {"unit": unit.to_json(), "read": read.model_dump(mode="json"), "operators": [], "directory": sys.argv[2] + "/out/web/f"}
    kept += run_unit(Task({**given, "key": "k", "batch_rows": 2048, "measure": "none"}), Report(lambda message: None))["rows"]
# not ru_maxrss, which begins at what the parent held
peak_mib = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
print(json.dumps([kept, peak_mib]))
"""
COUNT = """
import json, re, sys
from operators.sources import ReadSettings, plan_units, read_unit
read = ReadSettings(**json.loads(sys.argv[1]))
units = plan_units(read, sys.argv[2])
rows = sum(batch.table.num_rows for unit in units for batch in read_unit(unit, read))
peak_mib = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
print(json.dumps([rows, len(units), peak_mib]))
"""
SENTENCE = "这是一段用来测试的中文，夹着 some English words and numbers 123。"


def run(script: str, read: dict[str, Any], folder: Path) -> list[int]:
    command = [sys.executable, "-c", script, json.dumps(read), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def write(folder: Path, name: str, megabytes: int) -> None:
    """Three documents, the second of that size."""
    text = SENTENCE * (megabytes * 1_000_000 // len(SENTENCE.encode()))
    if name.endswith("csv"):
        data = f'text\nfirst\n"{text}"\nlast\n'
    elif name.endswith("jsonl"):
        data = "".join(json.dumps({"text": item}, ensure_ascii=False) + "\n" for item in ("first", text, "last"))
    else:
        data = f"first\n{text}\nlast\n"
    (folder / name).write_text(data, "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_text_of_200_megabytes_passes_from_file_to_part_in_bounded_memory(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, 200)
    kept, peak_mib = run(READ, {"path": name, "max_text_bytes": 210_000_000}, tmp_path)
    assert kept == 3
    assert peak_mib < 3000  # ten to eleven times the text, and 290 MiB of the process itself
    kept, peak_mib = run(READ, {"path": name}, tmp_path)  # over the default limit: set aside
    assert kept == 2
    assert peak_mib < 800


@pytest.mark.slow
def test_a_file_of_5_gigabytes_is_cut_and_streamed_in_bounded_memory(tmp_path: Path) -> None:
    block = b"".join(b'{"id": "%06d", "text": "%s"}\n' % (number, SENTENCE.encode() * 12) for number in range(8000))
    with open(tmp_path / "a.jsonl", "wb") as stream:
        count = 5_000_000_000 // len(block) + 1
        for _ in range(count):
            stream.write(block)
    rows, units, peak_mib = run(COUNT, {"path": "a.jsonl"}, tmp_path)
    assert rows == 8000 * count
    assert units > 70
    assert peak_mib < 700
    (tmp_path / "a.jsonl").rename(tmp_path / "a.csv")  # as CSV of one column: one unit, streamed
    rows, units, peak_mib = run(
        COUNT, {"path": "a.csv", "csv": {"column_names": ["text"], "quote": None, "delimiter": "\x01"}}, tmp_path
    )
    assert (rows, units) == (8000 * count, 1)
    assert peak_mib < 900


@pytest.mark.slow
def test_a_file_many_times_larger_than_the_bound_is_streamed(tmp_path: Path) -> None:
    """The same as above in small: a file full of holes whose units are read one after the other."""
    with open(tmp_path / "a.jsonl", "wb") as stream:
        for number in range(5):
            stream.write(b'{"text": "%d"}\n' % number)
            stream.seek(12_000_000 * (number + 1))  # a hole is one long line of zeros: set aside, never held
            stream.write(b"\n")
    rows, units, peak_mib = run(COUNT, {"path": "a.jsonl", "max_unit_bytes": 9_000_000, "max_text_bytes": 500_000}, tmp_path)
    assert rows == 5
    assert units == 7
    assert peak_mib < 500
