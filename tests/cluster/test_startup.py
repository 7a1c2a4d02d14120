"""pandas is loaded when it is used, and pyarrow then treats it as always."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

_USE = """
import sys
from cluster.startup import defer_pandas
defer_pandas()
import pyarrow as pa
pa.array(["a"]); pa.scalar(1); pa.table({"a": [1]}).to_pylist()
print("pandas" in sys.modules)
"""


def output(then: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", _USE + then], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not run.stderr
    return run.stdout.split()


def test_conversions_do_not_load_pandas_and_a_series_is_known_from_its_import_on() -> None:
    then = "import pandas as pd; print(pa.array(pd.Series([1.5, float('nan')])).null_count, pa.lib._pandas_api.have_pandas)"
    assert output(then) == ["False", "1", "True"]


def test_to_pandas_and_back_work_as_always() -> None:
    then = "f = pa.table({'a': [1, None]}).to_pandas(); print(type(f).__name__, pa.Table.from_pandas(f)['a'].null_count)"
    assert output(then) == ["False", "DataFrame", "1"]
