"""What Ray is told about a node: the arguments of `ray start`, the same on Kubernetes and on a launcher's machines."""

from __future__ import annotations

import math

from cluster.manifests.settings import Head, Settings, Workers
from cluster.placement import advertised, resource

GIB = 1 << 30
GCS_PORT = 6379
DASHBOARD_PORT = 8265
METRICS_PORT = 8080


def custom_resources(settings: Settings, group: Workers | None) -> dict[str, int]:
    """What a node of `group` advertises; for the head (None) what the cluster may grow to. Whole numbers."""
    return advertised(settings.growth()) if group is None else {resource(kind): 1 for kind in group.kinds}


def object_store_bytes(node: Head | Workers) -> int:
    return math.floor(node.object_store_gib * GIB)


def shared_memory_bytes(node: Head | Workers) -> int:
    """The size of /dev/shm: the object store, a tenth of it to spare (Ray writes to disk where it does not fit), and `shm_gib`."""
    besides = node.shm_gib if isinstance(node, Workers) else 0.0
    return math.ceil(1.1 * object_store_bytes(node) + besides * GIB)


def heap_bytes(node: Head | Workers) -> int:
    """What Ray may hand out as memory of tasks: a node's memory without the shared part, which counts as the pod's too."""
    return math.floor(node.memory_gib * GIB) - shared_memory_bytes(node)


def environment(settings: Settings, head: bool) -> dict[str, str]:
    """Variables of every Ray process of a node, without secrets."""
    found = {"RAY_USAGE_STATS_ENABLED": "0"}
    if head:
        # the driver runs here: how long it waits for the nodes of a training group, which a cloud may take minutes to start
        found["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(settings.job.start_timeout_s)
    return {**found, **settings.env}
