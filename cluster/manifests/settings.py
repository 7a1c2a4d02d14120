"""What a manifest may be told: typed settings with defaults that render a working one, unknown keys refused.

Sizes are GiB. Secrets are named, never written: a manifest is a file that goes into version control.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any, Literal

import pydantic
from pydantic import Field, field_validator, model_validator

from cluster.placement import KINDS, Kind

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_SECRET = re.compile(r"(^|_)(KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
RESTARTABLE: frozenset[Kind] = frozenset({"cpu", "generate"})
"""Kinds of work that lose a unit or the replies in flight with a node; training loses the whole group's step and waits."""


_NODES = frozenset({"name", "image", "gpu_image", "image_pull_policy", "head", "workers", "env", "auth", "autoscaler", "job"})
USED: dict[str, frozenset[str]] = {
    "kuberay": _NODES | {
        "namespace", "image_pull_secrets", "ray_version", "platform", "service_account", "credentials", "credentials_secret",
        "volumes", "auth_secret", "redis",
    },
    "launcher": _NODES | {"launcher"},
    "slurm": frozenset({"name", "env", "slurm"}),
    "containerfile": frozenset({"container"}),
}  # fmt: skip
"""The settings that each target reads."""


class ManifestError(ValueError):
    """Settings that give no working manifest: says which, and what to do."""


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)


class SecretKey(Strict):
    """One value of a Kubernetes secret; `NAME/KEY` for short."""

    secret: str = Field(min_length=1, description="name of the secret")
    key: str = Field(min_length=1, description="key of the value in it")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        if isinstance(given, str):
            secret, slash, key = given.partition("/")
            if not slash:
                raise ValueError("name a secret and its key as SECRET/KEY; a value never stands in a manifest")
            return {"secret": secret, "key": key}
        return given


class Toleration(Strict):
    """A Kubernetes toleration."""

    key: str = Field(default="", description="the taint's key; empty: every key (operator Exists)")
    operator: Literal["Exists", "Equal"] = Field(default="Exists", description="Exists, or Equal to `value`")
    value: str = Field(default="", description="the taint's value, for Equal")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(default="", description="empty: every effect")


class Head(Strict):
    """The head node: Ray's control process and the driver of the run. No task runs on it."""

    cpus: int = Field(default=4, ge=1, description="cores of the pod or machine; Ray is told 0, so that no task lands here")
    memory_gib: float = Field(default=16, gt=1, description="memory")
    object_store_gib: float = Field(default=1, gt=0, description="Ray's object store, in shared memory, part of `memory_gib`")
    disk_gib: float = Field(default=0, ge=0, description="local disk to ask for (logs, spilled objects); 0: do not ask")
    node_selector: dict[str, str] = Field(default_factory=dict, description="labels that the head's node must have")
    tolerations: list[Toleration] = Field(default_factory=list, description="taints that the head tolerates")
    instance: str = Field(default="", description="launcher: machine type, e.g. m7i.xlarge")

    @model_validator(mode="after")
    def _fits(self) -> Head:
        _check_memory(self.memory_gib, self.object_store_gib)
        return self


class Workers(Strict):
    """One group of equal worker nodes."""

    kinds: list[Kind] = Field(min_length=1, description="work that runs here: cpu, generate (GPUs that answer), train")
    min: int = Field(default=0, ge=0, description="nodes that are always there")
    max: int = Field(default=1, ge=1, description="most nodes")
    cpus: int = Field(default=8, ge=1, description="cores of a node")
    memory_gib: float = Field(default=32, gt=1, description="memory of a node")
    gpus: int = Field(default=0, ge=0, description="GPUs of a node")
    accelerator: str = Field(default="", description="GPU as the platform's node label names it; empty: any")
    gpu_resource: str = Field(default="nvidia.com/gpu", description="name of the GPUs among a node's Kubernetes resources")
    spot: bool | None = Field(
        default=None, description="nodes that may be taken away; default: where the platform has them and no training runs here"
    )
    object_store_gib: float = Field(default=2, gt=0, description="Ray's object store, in shared memory, part of `memory_gib`")
    shm_gib: float = Field(default=0, ge=0, description="shared memory besides (NCCL, vLLM, data loaders), part of `memory_gib`")
    disk_gib: float = Field(default=0, ge=0, description="local disk to ask for (logs, spilled objects); 0: do not ask")
    idle_s: int | None = Field(
        default=None, ge=0, description="seconds without work before a node goes; default: autoscaler.idle_s"
    )
    image: str = Field(default="", description="container image; default: `gpu_image` with GPUs, else `image`")
    node_selector: dict[str, str] = Field(default_factory=dict, description="further labels that a node must have")
    tolerations: list[Toleration] = Field(default_factory=list, description="further taints that the pods tolerate")
    instance: str = Field(default="", description="launcher: machine type, e.g. g6.2xlarge")

    @model_validator(mode="after")
    def _sound(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        if self.spot and "train" in self.kinds:
            raise ValueError("training does not run on spot nodes: one lost node stops the whole group; set spot=false")
        if self.accelerator and not self.gpus:
            raise ValueError(f"accelerator is {self.accelerator!r} but gpus is 0")
        _check_memory(self.memory_gib, self.object_store_gib + self.shm_gib)
        return self

    @property
    def restartable(self) -> bool:
        return set(self.kinds) <= RESTARTABLE


class Redis(Strict):
    """Redis behind Ray's control process: with it the head may be lost without the cluster."""

    address: str = Field(min_length=1, description="HOST:PORT")
    username: SecretKey | None = Field(default=None, description="SECRET/KEY of the user name")
    password: SecretKey | None = Field(default=None, description="SECRET/KEY of the password")


class Autoscaler(Strict):
    """Ray's autoscaler, version 2."""

    idle_s: int = Field(default=300, ge=0, description="seconds without work before a node goes; an engine's start takes minutes")
    upscaling: Literal["Default", "Conservative", "Aggressive"] = Field(
        default="Default", description="Conservative: at most as many nodes at once as there are"
    )


class Job(Strict):
    """The RayJob: one run of a recipe."""

    retries: int = Field(default=4, ge=0, description="fresh clusters after a failure; each goes on where the last one stopped")
    ttl_s: int = Field(default=600, ge=0, description="seconds that a finished job's cluster stays, for its logs")
    deadline_s: int = Field(default=0, ge=0, description="seconds before the job is ended; 0: never")
    keep_cluster: bool = Field(default=False, description="leave the cluster running when the job has ended")
    directory: str = Field(default="/opt/danlu", description="folder of the image that the recipe's relative paths start from")
    start_timeout_s: int = Field(default=1800, ge=60, description="seconds that training waits for its nodes to start")


class Launcher(Strict):
    """The Ray cluster launcher (`ray up`)."""

    provider: Literal["aws", "gcp", "local"] = Field(default="aws", description="cloud, or `local`: machines that are there")
    region: str = Field(default="us-west-2", description="aws, gcp: region")
    zone: str = Field(default="", description="aws, gcp: zone (required by gcp); aws: comma-separated, empty for any")
    project: str = Field(default="", description="gcp: project id")
    machine_image: str = Field(default="", description="aws: AMI; gcp: source image of the boot disk (required by gcp)")
    disk_gib: int = Field(default=200, ge=10, description="boot disk of a node")
    instance_profile: str = Field(
        default="",
        description="aws: instance profile ARN, which may start machines; gcp: service account",
    )
    ssh_user: str = Field(default="ubuntu", description="user to log in as")
    ssh_private_key: str = Field(default="", description="path of the key; empty: a cloud's is made by Ray")
    head_ip: str = Field(default="", description="local: address of the head")
    worker_ips: list[str] = Field(default_factory=list, description="local: addresses of the workers")
    docker: bool = Field(default=True, description="run in containers of `image`; false: Danlu is installed on the machines")


class Slurm(Strict):
    """The Slurm script: one allocation of equal nodes, the first of which is also the head."""

    nodes: int = Field(default=1, ge=1, description="nodes")
    cpus_per_node: int = Field(default=0, ge=0, description="cores of each; 0: the whole node (--exclusive)")
    memory_per_node: str = Field(default="", description="memory of each, e.g. 200G; empty: the partition's default")
    gpus_per_node: int = Field(default=0, ge=0, description="GPUs of each")
    time: str = Field(default="24:00:00", pattern=r"^(\d+-)?\d+(:\d\d){0,2}$", description="longest time of one start")
    partition: str = Field(default="", description="partition")
    account: str = Field(default="", description="account")
    qos: str = Field(default="", description="quality of service")
    constraint: str = Field(default="", description="features that the nodes must have")
    reservation: str = Field(default="", description="reservation")
    output: str = Field(default="danlu-%j.log", description="file of the output")
    warning_s: int = Field(
        default=300, ge=60, description="seconds before the time limit at which the run stops and is queued again"
    )
    requeues: int = Field(default=100, ge=0, description="most restarts, after preemption, node failure or the time limit")
    directory: str = Field(default="", description="folder to run in; empty: where sbatch was called")
    environment: list[str] = Field(
        default_factory=list, description="shell lines that make `python` and `ray` available, e.g. `module load cuda`"
    )
    srun: list[str] = Field(default_factory=list, description="further arguments of srun, e.g. --container-image=...")
    object_store_gib: float = Field(default=2, gt=0, description="Ray's object store of each node")
    interface: str = Field(default="", description="network interface of the nodes, e.g. ib0; empty: by host name")
    join_s: int = Field(default=600, ge=10, description="seconds that all nodes have to join")


class Container(Strict):
    """The container file."""

    device: Literal["cpu", "gpu"] = Field(default="cpu", description="which of requirements/cpu.txt and gpu.txt is installed")
    base: str = Field(default="", description="image to build on; empty: the one named in the file")


def _default_workers() -> dict[str, Workers]:
    return {
        "cpu": Workers(kinds=["cpu"], min=1, max=8, cpus=8, memory_gib=32),
        "gpu": Workers(kinds=["generate"], max=2, cpus=8, memory_gib=64, gpus=1, shm_gib=8),
        "train": Workers(kinds=["train"], max=1, cpus=16, memory_gib=128, gpus=4, shm_gib=16),
    }


class Settings(Strict):
    """Everything a manifest may be told."""

    name: str = Field(default="danlu", description="name of the job or cluster")
    namespace: str = Field(default="default", description="Kubernetes namespace")
    image: str = Field(default="danlu:cpu", description="container image of the head and of workers without a GPU")
    gpu_image: str = Field(default="danlu:gpu", description="container image of workers with GPUs")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(default="IfNotPresent", description="when to pull")
    image_pull_secrets: list[str] = Field(default_factory=list, description="names of the secrets to pull with")
    ray_version: str = Field(default_factory=lambda: metadata.version("ray"), description="Ray of the image; default: the one here")
    platform: Literal["generic", "gke", "eks", "karpenter", "aks"] = Field(
        default="generic", description="whose node labels name spot nodes and GPUs"
    )
    head: Head = Field(default_factory=Head, description="the head node")
    workers: dict[str, Workers] = Field(default_factory=_default_workers, description="groups of worker nodes, by name")
    service_account: str = Field(default="", description="Kubernetes service account of all pods, which may read the storage")
    credentials: dict[str, SecretKey] = Field(
        default_factory=dict, description="environment variables from secrets, e.g. AWS_SECRET_ACCESS_KEY: storage/secret_key"
    )
    credentials_secret: str = Field(default="", description="secret of which every key becomes an environment variable")
    env: dict[str, str] = Field(default_factory=dict, description="further environment variables; none that holds a secret")
    volumes: dict[str, str] = Field(
        default_factory=dict, description="folders that all pods share: mount path: claim (ReadWriteMany)"
    )
    auth: Literal["token", "disabled"] = Field(default="token", description="whether Ray asks for a token")
    auth_secret: str = Field(default="", description="secret with the token under `auth_token` (KubeRay 1.6); empty: one is made")
    redis: Redis | None = Field(default=None, description="Redis behind Ray's control process")
    autoscaler: Autoscaler = Field(default_factory=Autoscaler, description="how the cluster grows and shrinks")
    job: Job = Field(default_factory=Job, description="kuberay, kind job")
    launcher: Launcher = Field(default_factory=Launcher, description="launcher")
    slurm: Slurm = Field(default_factory=Slurm, description="slurm")
    container: Container = Field(default_factory=Container, description="containerfile")

    @field_validator("name")
    @classmethod
    def _named(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("must be at most 40 of a-z, 0-9 and -, begin with a letter and not end with -")
        return name

    @field_validator("workers")
    @classmethod
    def _groups(cls, groups: dict[str, Workers]) -> dict[str, Workers]:
        if not groups:
            raise ValueError("there is no group of workers, and no work is done on the head")
        for name in groups:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"group {name!r}: a name is at most 40 of a-z, 0-9 and -, begins with a letter, does not end with -"
                )
        return groups

    @field_validator("env")
    @classmethod
    def _open(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if _SECRET.search(name):
                raise ValueError(f"{name} looks like a secret: name where it lies, credentials.{name}=SECRET/KEY")
        return env

    @field_validator("volumes")
    @classmethod
    def _mounts(cls, volumes: dict[str, str]) -> dict[str, str]:
        for path in volumes:
            if not path.startswith("/") or path.rstrip("/") in ("", "/dev", "/dev/shm", "/tmp", "/tmp/ray"):
                raise ValueError(f"{path!r} is no folder to mount at")
        return volumes

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.auth == "disabled" and self.auth_secret:
            raise ValueError("auth_secret is set but auth is disabled")
        return self

    def check_used(self, target: str) -> None:
        """Raises ManifestError for settings that were changed and that a target (a key of USED) does not read."""
        defaults = Settings()
        changed = {name for name in type(self).model_fields if getattr(self, name) != getattr(defaults, name)}
        if unread := sorted(changed - USED[target]):
            raise ManifestError(f"--set {', '.join(unread)}: danlu manifest {target} reads only {', '.join(sorted(USED[target]))}")

    def image_of(self, group: Workers) -> str:
        return group.image or (self.gpu_image if group.gpus else self.image)

    def for_kinds(self, wanted: set[Kind]) -> Settings:
        """With the groups alone that do work of these kinds; CPU groups always stay, for every run has such work.

        Raises ManifestError when no group offers a kind.
        """
        kept = {name: group for name, group in self.workers.items() if {*wanted, "cpu"} & set(group.kinds)}
        offered = {kind for group in kept.values() for kind in group.kinds}
        missing = [kind for kind in KINDS if kind in wanted and kind not in offered]
        if missing:
            raise ManifestError(f"the recipe's stages need workers for {' and '.join(missing)}, which no group has among its kinds")
        return self.model_copy(update={"workers": kept})

    def growth(self) -> dict[Kind, tuple[int, int]]:
        """(most nodes, most GPUs) that each kind of work can have."""
        found: dict[Kind, tuple[int, int]] = {}
        for group in self.workers.values():
            for kind in group.kinds:
                nodes, gpus = found.get(kind, (0, 0))
                found[kind] = (nodes + group.max, gpus + group.max * group.gpus)
        return found

    def cpu_workers(self) -> int:
        """Units that can be done at once on all cores for operators, fully grown: the run's `--workers`."""
        groups = [group for group in self.workers.values() if "cpu" in group.kinds] or list(self.workers.values())
        return sum(group.max * group.cpus for group in groups)


def _check_memory(memory_gib: float, shared_gib: float) -> None:
    if shared_gib > memory_gib / 2:
        raise ValueError(
            f"shared memory (object store and shm: {shared_gib:g} GiB) counts as memory of the node and is more than half "
            f"of its {memory_gib:g} GiB"
        )
