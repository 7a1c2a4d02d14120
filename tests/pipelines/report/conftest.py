"""One fixture run for the whole room; tests that change it take a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.pipelines.report.fixture_run import build_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of every kind of stage. Not to be changed."""
    return build_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """The same run, to be broken."""
    return Path(shutil.copytree(finished_run, tmp_path / "quickstart"))
