"""Ray's object store is full of other objects: they go to disk, and a stage that exchanges keys ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.faults.test_kill_dedup import run_both


@pytest.mark.usefixtures("ray_cluster")
def test_a_full_object_store_spills_and_changes_nothing(tmp_path: Path) -> None:
    import ray

    wanted = run_both(tmp_path / "empty", 2)
    store = int(ray.cluster_resources()["object_store_memory"])
    block = 16 << 20
    held = [ray.put(np.full(block, number % 251, np.uint8)) for number in range(store // block + 4)]
    assert run_both(tmp_path / "full", 2) == wanted
    assert all(ray.get(reference)[-1] == number % 251 for number, reference in enumerate(held)), "what was spilled is there"
