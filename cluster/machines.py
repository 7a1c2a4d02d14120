"""What a cluster consists of, as far as a plan needs it. Profiles of usual clusters lie in `profiles/`.

Sizes are in GB (10^9 bytes), speeds in MB/s and Gbit/s as data sheets have them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic
from pydantic import Field

PROFILES = Path(__file__).parent / "profiles"
"""Ready descriptions, each a YAML file named as the command names it."""

_STORE_SHARE = 0.3
"""Ray's own default size of the object store, as a share of a node's memory."""


class _Described(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Gpu(_Described):
    """One kind of GPU."""

    name: str = Field(description="as people call it, e.g. `H100 SXM 80GB`")
    memory_gb: float = Field(gt=0, description="memory of one")
    bf16_tflops: float = Field(gt=0, description="dense bf16 peak, 10^12 operations a second")
    memory_gb_s: float = Field(gt=0, description="bandwidth of its memory, GB/s")


class NodeGroup(_Described):
    """Nodes of one kind."""

    name: str = Field(default="nodes", description="named in warnings")
    count: int = Field(default=1, ge=1, description="how many of them")
    cpus: int = Field(ge=1, description="cores of one node (not hyper-threads)")
    memory_gb: float = Field(gt=0, description="main memory of one node")
    disk_gb: float = Field(gt=0, description="free space on the node's own disk")
    disk_mb_s: float | None = Field(
        default=None, gt=0, description="what that disk reads or writes a second. Default: that of the machine of the rates"
    )
    network_gbit: float = Field(default=10, gt=0, description="the node's network")
    gpus: int = Field(default=0, ge=0, description="GPUs of one node")
    gpu: Gpu | None = Field(default=None, description="their kind; needed where `gpus` is above 0")
    object_store_gb: float | None = Field(
        default=None,
        ge=0,
        description="Ray's object store on one node. Default: 30% of the memory, as Ray's own; a Ray that `danlu run` starts takes "
        "a fifth, at most 2.1",
    )
    core_speed: float = Field(default=1.0, gt=0, description="speed of a core; 1 is one of the machine that the rates are from")

    @pydantic.model_validator(mode="after")
    def _kind_of_gpu(self) -> NodeGroup:
        if self.gpus and self.gpu is None:
            raise ValueError("`gpus` needs `gpu`: {name, memory_gb, bf16_tflops, memory_gb_s}")
        return self


class Storage(_Described):
    """Where the runs lie."""

    kind: Literal["local", "shared", "object_store"] = Field(
        description="local: the first node's disk; shared: a folder that all nodes mount; object_store: s3, gs and the like"
    )
    free_gb: float | None = Field(default=None, gt=0, description="free space; of `local` that is the disk's, of others unlimited")
    mb_s: float | None = Field(default=None, gt=0, description="all that it serves a second. Default: what disk or network carry")
    latency_ms: float = Field(default=0.0, ge=0, description="until a small read begins to answer")


class Cluster(_Described):
    """A cluster: groups of nodes, and where the runs lie."""

    name: str = Field(description="named in the plan")
    description: str = Field(default="", description="a sentence about it")
    nodes: list[NodeGroup] = Field(min_length=1, description="groups of like nodes")
    storage: Storage = Field(description="where `--runs` lies")

    @property
    def node_count(self) -> int:
        return sum(group.count for group in self.nodes)

    @property
    def cores(self) -> int:
        return sum(group.count * group.cpus for group in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(group.count * group.gpus for group in self.nodes)

    def task_memory(self, group: NodeGroup) -> float:
        """Bytes of one node that tasks may take: its memory without the object store and a tenth for all else."""
        store = _STORE_SHARE * group.memory_gb if group.object_store_gb is None else group.object_store_gb
        return max(0.0, 0.9 * group.memory_gb - store) * 1e9

    @property
    def free_bytes(self) -> float | None:
        """Free space where the runs lie; None where nothing bounds it."""
        if self.storage.free_gb is not None:
            return self.storage.free_gb * 1e9
        return self.nodes[0].disk_gb * 1e9 if self.storage.kind == "local" else None

    def storage_bytes_s(self, disk_mb_s: float) -> float:
        """What the storage of the runs carries a second, over all nodes; `disk_mb_s` is that of a disk that is not described."""
        network = sum(group.count * group.network_gbit for group in self.nodes) * 1e9 / 8
        if self.storage.kind == "local":
            return (self.storage.mb_s or self.nodes[0].disk_mb_s or disk_mb_s) * 1e6
        return network if self.storage.mb_s is None else min(network, self.storage.mb_s * 1e6)
