from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.placement import KINDS, SHARE, advertised, reachable_gpus, resource, share_of

ROOT = Path(__file__).resolve().parents[2]


def test_a_cluster_that_advertises_nothing_is_used_as_it_was() -> None:
    laptop = {"CPU": 8.0, "GPU": 1.0, "memory": 1e9}
    assert all(share_of(kind, laptop) == {} for kind in KINDS)
    assert all(reachable_gpus(kind, laptop, [laptop]) == 1 for kind in KINDS)


def test_a_kind_asks_for_its_own_nodes_also_before_there_are_any() -> None:
    head = {"CPU": 0.0, **advertised({"cpu": (8, 0), "train": (2, 16)})}
    assert share_of("cpu", head) == {"danlu_cpu": SHARE} and share_of("train", head) == {"danlu_train": SHARE}
    assert share_of("generate", head) == {}
    assert reachable_gpus("train", head, [head]) == 16 and reachable_gpus("cpu", head, [head]) == 0


def test_gpus_of_other_kinds_are_not_counted() -> None:
    nodes = [{"GPU": 4.0, resource("generate"): 1.0}, {"GPU": 8.0, resource("train"): 1.0}, {"CPU": 64.0, resource("cpu"): 1.0}]
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.items():
            total[name] = total.get(name, 0) + amount
    assert (reachable_gpus("generate", total, nodes), reachable_gpus("train", total, nodes)) == (4, 8)


IN_A_CLUSTER = """
import os, sys
import ray
from ray.cluster_utils import Cluster
from cluster.placement import KINDS, advertised, gpus, placement, resource

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "resources": advertised({k: (1, 0) for k in KINDS})})
ray.init(address=cluster.address, log_to_driver=False)
assert placement("cpu") == {"danlu_cpu": 0.001}, "before any worker there is"
nodes = {k: cluster.add_node(num_cpus=2, resources={resource(k): 1}).node_id for k in KINDS}
cluster.wait_for_nodes()

@ray.remote(num_cpus=1)
def where():
    return ray.get_runtime_context().get_node_id()

for kind in KINDS:
    task = where.options(resources=placement(kind))
    found = set(ray.get([task.remote() for _ in range(6)]))
    assert found == {nodes[kind]}, (kind, found)

from operators.dispatch import run_units
from operators.stage import StageContext
from operators.supervise import Limits

run = sys.argv[1]
context = StageContext("s", "corpus", run, "", {}, {}, 0, workers=4)
run_units(context, "tests.cluster.placed:note_node", [{"unit": n, "directory": run} for n in range(6)], Limits())
assert {name.split("-")[0] for name in os.listdir(run)} == {nodes["cpu"]}, os.listdir(run)

from train.session import TrainGroup
group = TrainGroup(workers=2, storage_path=run + "-train", use_gpu=False)
group.start()
import time
deadline = time.monotonic() + 240
from ray._private.state import actors  # without a dashboard

def nodes_of(name):
    alive = [a for a in actors().values() if a["ActorClassName"] == name and a["State"] == "ALIVE"]
    return {a["Address"]["NodeID"] for a in alive}

placed = set()
while time.monotonic() < deadline:
    if placed := nodes_of("RayTrainWorker"):
        break
    time.sleep(1)
assert placed == {nodes["train"]}, placed
assert nodes_of("Coordinator") == {cluster.head_node.node_id}
group.stop()
print("apart")
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_operators_and_training_run_on_nodes_of_their_own_kind(tmp_path: Path) -> None:
    """A head without CPUs and one node for each kind, real raylets of one machine."""
    (tmp_path / "run").mkdir()
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "180"}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CLUSTER, str(tmp_path / "run")], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("apart\n"), done.stdout[-2000:] + done.stderr[-4000:]
