"""Waits until a Ray cluster has all of its nodes: `python -m cluster.ready --address HOST:PORT --nodes N`."""

from __future__ import annotations

import argparse
import sys
import time

from cluster.connect import connect, connected, disconnect

_PAUSE_S = 1.0


def wait_for_nodes(address: str, nodes: int, timeout_s: float) -> int:
    """The number of nodes that are alive at `address`, once it is `nodes` or `timeout_s` have passed. Leaves the cluster again.

    Raises ConnectionError when no Ray answers there in that time.
    """
    import ray

    deadline = time.monotonic() + timeout_s
    while not connected():
        try:
            connect(address)
        except ConnectionError:  # the head is still starting
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_S)
    try:
        while True:
            alive = sum(bool(node["Alive"]) for node in ray.nodes())
            if alive >= nodes or time.monotonic() > deadline:
                return alive
            time.sleep(_PAUSE_S)
    finally:
        disconnect()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True, metavar="HOST:PORT")
    parser.add_argument("--nodes", required=True, type=int, metavar="N")
    parser.add_argument("--timeout", default=600.0, type=float, metavar="SECONDS")
    given = parser.parse_args()
    try:
        found = wait_for_nodes(given.address, given.nodes, given.timeout)
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if found < given.nodes:
        print(f"error: {found} of {given.nodes} nodes joined {given.address} within {given.timeout:.0f} s", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
