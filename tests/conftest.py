"""Shared fixtures: one Ray for the whole session, and the optional data pack beside the checkout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of four logical CPUs, without dashboard, shut down at the end of the session."""
    import ray

    from cluster.connect import start_local

    start_local(4, 256 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def example_data() -> Path:
    """The data that ships with the project."""
    return ROOT / "examples" / "data"


@pytest.fixture(scope="session")
def data_pack() -> Path:
    """A larger labelled data pack in `../shared/data`, for checkouts that have one; skips otherwise."""
    path = ROOT.parent / "shared" / "data"
    if not path.exists():
        pytest.skip("the data pack ../shared/data is not beside this checkout")
    return path
