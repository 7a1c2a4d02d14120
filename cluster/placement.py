"""Which nodes of a cluster a kind of work runs on: CPU operators, GPUs that answer, GPUs that train.

Nodes made for a kind advertise one unit of the custom resource `danlu_KIND`, and whoever asks for a node of that kind asks for
a thousandth of it: it says where, not how much. So CPU operators do not fill the cores beside a vLLM engine, and an engine
does not take the GPUs that a training group waits for. A cluster that advertises nothing (a laptop) is used as before.

A group of nodes that scales from nothing has no node to advertise anything when a run starts. The head node therefore
advertises `danlu_KIND_nodes` and `danlu_KIND_gpus`: how many the cluster may grow to. The manifests set all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Kind = Literal["cpu", "generate", "train"]
"""`cpu`: operators; `generate`: engines, judges, scorers and embedders on a GPU; `train`: training workers."""
KINDS: tuple[Kind, ...] = get_args(Kind)

SHARE = 0.001
"""What one task or actor takes of a node's single unit: a thousand of them fit, which is more than a node has cores for."""


def resource(kind: Kind) -> str:
    """The custom resource that a node for `kind` advertises once."""
    return f"danlu_{kind}"


def advertised(kinds: Mapping[Kind, tuple[int, int]]) -> dict[str, int]:
    """What the head node advertises for kinds given as (most nodes, most GPUs): whole numbers, as Ray's autoscaler wants them."""
    told: dict[str, int] = {}
    for kind, (nodes, gpus) in kinds.items():
        told[f"danlu_{kind}_nodes"] = nodes
        if gpus:
            told[f"danlu_{kind}_gpus"] = gpus
    return told


def placement(kind: Kind) -> dict[str, float]:
    """The custom resources to ask for: `{"danlu_KIND": 0.001}` where the cluster has nodes for it, else nothing.

    One question to Ray's control process: ask once a stage, not once a task. Nothing, too, for a process that is not connected
    to Ray: the Ray that its first task starts is this machine's own.
    """
    import ray

    if not ray.is_initialized():
        return {}
    return share_of(kind, ray.cluster_resources())


def share_of(kind: Kind, resources: Mapping[str, float]) -> dict[str, float]:
    """`placement` on a cluster that advertises `resources` in all."""
    name = resource(kind)
    return {name: SHARE} if resources.get(name) or resources.get(f"{name}_nodes") else {}


def gpus(kind: Kind) -> int:
    """GPUs that work of this kind can have, those of nodes still to be started included. Ray must be initialised."""
    import ray

    return reachable_gpus(kind, ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]])


def reachable_gpus(kind: Kind, resources: Mapping[str, float], nodes: list[dict[str, float]]) -> int:
    """`gpus` on a cluster that advertises `resources` in all, by nodes that advertise each `nodes`."""
    name = resource(kind)
    if not share_of(kind, resources):
        return int(resources.get("GPU", 0))
    present = sum(node.get("GPU", 0) for node in nodes if node.get(name))
    return int(max(present, resources.get(f"{name}_gpus", 0)))
