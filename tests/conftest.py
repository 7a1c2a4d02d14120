"""Shared fixtures: one Ray for the whole session, and the optional data pack beside the checkout."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.object_store import line, object_store

__all__ = ["line", "object_store"]

ROOT = Path(__file__).resolve().parent.parent

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # A process that looks for "the Ray of this machine" is to find the one of its own half of the suite. The path is short:
    # Ray puts sockets below it.
    os.environ["RAY_TMPDIR"] = f"/tmp/danlu-{os.getuid()}-{worker}"


def _tell_dead_servers(config: pytest.Config, logs: Path, ended: threading.Event) -> None:
    """Ray ends its driver, here pytest, without a word when one of its servers died: say which, and its last lines."""
    from cluster.connect import ended_servers

    while not ended.wait(0.1):
        for name in ended_servers():
            lines = (logs / f"{name}.out").read_text("utf-8", "replace").splitlines()[-60:]
            with config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
                print(f"\nRay's {name} has died ({logs}):", *lines, sep="\n", flush=True)
            return


@pytest.fixture(scope="session")
def ray_cluster(pytestconfig: pytest.Config) -> Iterator[None]:
    """A local Ray of four logical CPUs, without dashboard, shut down at the end of the session."""
    import ray

    from cluster.connect import start_local

    start_local(4, 256 << 20)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[attr-defined]
    ended = threading.Event()
    threading.Thread(target=_tell_dead_servers, args=(pytestconfig, logs, ended), daemon=True).start()
    yield
    ended.set()
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
