"""One host of the clusters of tests: `python -m tests.cluster.host`, told by lines of JSON which of Ray's servers to start.

What `ray start` does, in a process that has imported Ray once: a node takes 2 seconds instead of 10.
"""

from __future__ import annotations

import json
import sys
import threading
import time

from ray._private import ray_constants
from ray._private.node import Node
from ray._private.parameter import RayParams


def _reap(nodes: list[Node]) -> None:
    """What tests kill is gone, not a zombie."""
    while True:
        time.sleep(0.1)
        for node in list(nodes):
            for found in node.all_processes.values():
                for info in found:
                    info.process.poll()


def main() -> None:
    nodes: list[Node] = []
    threading.Thread(target=_reap, args=(nodes,), daemon=True).start()
    for line in sys.stdin:
        wanted = json.loads(line)
        head = wanted.pop("head")
        settings = {
            "num_gpus": 0,
            "min_worker_port": 0,
            "max_worker_port": 0,
            "include_log_monitor": False,
            "include_dashboard": False,
        }
        if not head:
            settings |= {"node_manager_port": 0, "dashboard_agent_listen_port": None}
        parameters = RayParams(**{**settings, **wanted})
        node = Node(parameters, head=head, shutdown_at_exit=False, spawn_reaper=False)
        nodes.append(node)
        kinds = {"raylet": ray_constants.PROCESS_TYPE_RAYLET, "gcs_server": ray_constants.PROCESS_TYPE_GCS_SERVER}
        started = {name: node.all_processes[kind][0].process.pid for name, kind in kinds.items() if kind in node.all_processes}
        print(json.dumps({"address": node.gcs_address, **started}), flush=True)


if __name__ == "__main__":
    main()
