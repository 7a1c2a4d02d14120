"""Fixtures of the synthesis tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_cache(request: pytest.FixtureRequest) -> Path:
    """A cache directory for the converted model (named by content), kept between sessions."""
    return Path(request.config.cache.mkdir("models"))
