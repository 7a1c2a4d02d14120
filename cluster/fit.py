"""Memory and speed of models on devices: what training and generation hold, on how many GPUs they fit, how long they take.

Pure arithmetic over plain numbers. Bytes are bytes, speeds operations or bytes a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.machines import Cluster, Gpu, NodeGroup
from cluster.rates import Rates

_STATE_BYTES = 16
"""Of a trained weight: itself, its gradient and AdamW's two moments, in float32."""

_RESERVED_BYTES = 2.5e9
"""Of a GPU: its context, the logits of one chunk (train.objective), buffers of the collectives."""

_CHECKPOINTED = {"none": 1.0, "selective": 0.45, "full": 0.06}
"""Activations kept as a share of all, by activation checkpointing."""

_FP32_SHARE = 0.5
"""Peak in float32 (TF32) over that in bf16."""

_ENGINE_BYTES = 1.5e9


@dataclass(frozen=True)
class Model:
    """A decoder as plain numbers. `active`: parameters that a token is multiplied with."""

    parameters: float
    active: float
    layers: int
    hidden: int
    kv_width: int  # of keys alone: kv heads x head width
    heads: int = 1
    kv_heads: int = 1
    can_share_products: bool = True


@dataclass(frozen=True)
class Training:
    """A training stage: `flops` in all, forward and backward; a step sees `batch` rows of `length` tokens."""

    model: Model
    flops: float
    steps: float
    batch: int
    length: int
    micro: int | None = None
    trained: float | None = None  # parameters trained, if not all (adapters)
    frozen_bytes: float = 4.0  # bytes of a weight that is not trained
    sharding: str = "ddp"
    tensor: int = 1
    checkpointing: str = "none"
    precision: str = "bf16"
    checkpoints: int = 2  # kept on disk
    needs_gpu: bool = False
    spread: bool = False  # rows are dealt out to any number of workers (scoring), instead of a batch divided among them

    def divides(self, data: int) -> bool:
        """Whether a batch divides among so many groups of workers."""
        return self.spread or self.batch % data == 0


@dataclass(frozen=True)
class Generation:
    """A stage that asks a model. `weight_bytes`: of one parameter in the engine."""

    model: Model
    prompt_tokens: float
    completion_tokens: float
    running: int
    max_model_len: int
    weight_bytes: float = 2.0
    tensor: int = 1
    replicas: int = 1
    gpu_share: float = 0.9
    kv_cache_gb: float = 1.0
    device: str = "auto"


@dataclass(frozen=True)
class Layout:
    """How a model lies over GPUs."""

    sharding: str
    tensor: int
    checkpointing: str

    def __str__(self) -> str:
        tensor = f", tensor: {self.tensor}" if self.tensor > 1 else ""
        kept = f", activation_checkpointing: {self.checkpointing}" if self.checkpointing != "none" else ""
        return f"{{sharding: {self.sharding}{tensor}}}{kept}"


def layout_of(training: Training) -> Layout:
    return Layout(training.sharding, training.tensor, training.checkpointing)


def training_bytes(training: Training, layout: Layout, workers: int, activation_bytes: float) -> float:
    """Bytes that one of `workers` holds under a layout: parameters x 16 over the layout, and activations of a micro-batch."""
    data = max(1, workers // layout.tensor)
    trained = training.model.parameters if training.trained is None else training.trained
    frozen = 0.0 if training.trained is None else training.model.parameters
    parts = layout.tensor * (data if layout.sharding == "fsdp2" else 1)
    state = (trained * _STATE_BYTES + frozen * training.frozen_bytes) / parts
    if layout.sharding == "fsdp2" and data > 1:  # one block is whole while it works
        state += training.model.parameters / max(1, training.model.layers) / layout.tensor * 4 * 2
    rows = min(training.micro or training.batch, max(1, training.batch // data))
    scale = 1.0 if training.precision == "bf16" else 2.0
    kept = _CHECKPOINTED[layout.checkpointing] * training.model.layers + (0 if layout.checkpointing == "none" else 1)
    return state + rows * training.length * training.model.hidden * activation_bytes * scale * kept / layout.tensor


def usable_workers(training: Training, available: int, tensor: int) -> int:
    """The most workers, up to `available`, among whom a batch divides; 0 where there are none."""
    most = available // tensor
    if training.spread:
        return most * tensor
    data = next((n for n in range(min(most, training.batch), 0, -1) if training.divides(n)), 0)
    return data * tensor


def fitting(training: Training, gpus: int, gpu: Gpu, activation_bytes: float) -> Iterator[tuple[Layout, int]]:
    """Layouts under which the model fits, with the number of GPUs, those that change least first."""
    room = gpu.memory_gb * 1e9 - _RESERVED_BYTES
    tensors = [1, 2, 4, 8] if training.model.can_share_products else [1]
    wanted = layout_of(training)
    for checkpointing in dict.fromkeys([wanted.checkpointing, "full"]):
        for tensor in dict.fromkeys([wanted.tensor, *tensors]):
            if training.model.kv_heads % tensor or training.model.heads % tensor:
                continue
            workers = usable_workers(training, gpus, tensor)
            for sharding in dict.fromkeys([wanted.sharding, "fsdp2"]):
                if sharding == "ddp" and tensor > 1 and workers > tensor:
                    continue
                layout = Layout(sharding, tensor, checkpointing)
                if workers and training_bytes(training, layout, workers, activation_bytes) <= room:
                    yield layout, workers


def gpu_groups(cluster: Cluster) -> list[NodeGroup]:
    return [group for group in cluster.nodes if group.gpus]


@dataclass(frozen=True)
class Speed:
    """How a stage runs on devices: seconds of its work (infinite where no layout is possible), devices used and available, bytes
    that one must hold and has."""

    seconds: float
    devices: int
    available: int
    needs_bytes: float
    has_bytes: float
    on_gpu: bool
    network_bound: bool = False

    @property
    def fits(self) -> bool:
        return self.needs_bytes <= self.has_bytes


def train_speed(training: Training, cluster: Cluster, rates: Rates) -> Speed:
    """On the fastest choice of workers: GPUs if there are any, else the cores of as many nodes as divide the batch.

    More nodes are never slower: a step waits for the slower of arithmetic and exchange of gradients, which overlap, and
    what the plan chooses may leave nodes out.
    """
    groups = gpu_groups(cluster)
    if groups:
        found = [_on_gpus(training, [group], rates) for group in groups]
        if len(groups) > 1:
            found.append(_on_gpus(training, groups, rates))
        usable = [speed for speed in found if speed.devices]
        return min(usable or found, key=lambda speed: (not speed.fits, speed.seconds))
    return min((_on_cpus(training, group, rates, cluster) for group in cluster.nodes), key=lambda s: (not s.fits, s.seconds))


def _on_gpus(training: Training, groups: list[NodeGroup], rates: Rates) -> Speed:
    available = sum(group.count * group.gpus for group in groups)
    worst = min((group.gpu for group in groups if group.gpu), key=lambda gpu: gpu.bf16_tflops)
    memory = min(group.gpu.memory_gb for group in groups if group.gpu)
    each = min(group.gpus for group in groups)
    network = min(group.network_gbit for group in groups) * 1e9 / 8
    peak = worst.bf16_tflops * 1e12 * (1.0 if training.precision == "bf16" else _FP32_SHARE)
    known = rates.gpu is not None and set(rates.gpu.split()) <= set(worst.name.split())
    mfu = rates.gpu_mfu if rates.gpu_mfu is not None and known else rates.assumptions.mfu
    trained = training.model.parameters if training.trained is None else training.trained
    layout = layout_of(training)
    best: Speed | None = None
    most = available // layout.tensor
    for data in range(1, (most if training.spread else min(most, training.batch)) + 1):
        if not training.divides(data):
            continue
        workers = data * layout.tensor
        compute = training.flops / (workers * peak * mfu)
        often = 1.5 if layout.sharding == "fsdp2" else 1.0  # weights are gathered again for the backward pass
        exchange = training.steps * 2 * 4 * trained * often / network if workers > each else 0.0
        needs = training_bytes(training, layout, workers, rates.assumptions.activation_bytes)
        seconds = max(compute, exchange)
        speed = Speed(seconds, workers, available, needs, memory * 1e9 - _RESERVED_BYTES, True, exchange > compute)
        if best is None or (not speed.fits, speed.seconds) < (not best.fits, best.seconds):
            best = speed
    if best is None:
        needs = training_bytes(training, layout, layout.tensor, rates.assumptions.activation_bytes)
        return Speed(math.inf, 0, available, needs, memory * 1e9 - _RESERVED_BYTES, True)
    return best


def _on_cpus(training: Training, group: NodeGroup, rates: Rates, cluster: Cluster) -> Speed:
    """One worker a node; a node's cores share its products."""
    per_node = group.cpus * group.core_speed * rates.train_flops[training.precision]
    trained = training.model.parameters if training.trained is None else training.trained
    best: Speed | None = None
    for nodes in range(1, (group.count if training.spread else min(group.count, training.batch)) + 1):
        if not training.divides(nodes):
            continue
        compute = training.flops / (nodes * per_node)
        exchange = training.steps * 2 * 4 * trained / (group.network_gbit * 1e9 / 8) if nodes > 1 else 0.0
        layout = replace(layout_of(training), tensor=1)
        needs = training_bytes(training, layout, nodes, rates.assumptions.activation_bytes)
        cores, room = (nodes * group.cpus, group.count * group.cpus), cluster.task_memory(group)
        speed = Speed(max(compute, exchange), *cores, needs, room, False, exchange > compute)
        if best is None or (not speed.fits, speed.seconds) < (not best.fits, best.seconds):
            best = speed
    assert best is not None  # one node always divides a batch
    return best


def kv_bytes(model: Model) -> float:
    """Bytes of keys and values of one token, in 16 bits."""
    return model.layers * 2 * model.kv_width * 2.0


def generation_bytes(generation: Generation, tensor: int) -> float:
    """Bytes that one GPU of an engine must have at least: its share of the weights and of one longest row's keys and values."""
    weights = generation.model.parameters * generation.weight_bytes
    return (weights + generation.max_model_len * kv_bytes(generation.model)) / tensor + _ENGINE_BYTES


def fitting_tensor(generation: Generation, gpu: Gpu) -> int | None:
    """The least GPUs of one engine on which the model fits; None where eight are too few."""
    room = gpu.memory_gb * 1e9 * generation.gpu_share
    heads = generation.model.heads
    return next((n for n in (1, 2, 4, 8) if heads % n == 0 and generation_bytes(generation, n) <= room), None)


def generate_speed(generation: Generation, cluster: Cluster, rates: Rates) -> Speed:
    """On GPUs where there are any (unless the recipe says cpu): the longer of reading the weights and of arithmetic a step,
    never below what a step of so many layers takes. On CPU: operations over those of the engine's machine."""
    model, assume = generation.model, rates.assumptions
    groups = gpu_groups(cluster) if generation.device != "cpu" else []
    tokens = generation.prompt_tokens + generation.completion_tokens
    if not groups:
        flops_of_core = rates.cpu_generate_flops or rates.train_flops["bf16"] * assume.cpu_generation
        group = max(cluster.nodes, key=lambda node: node.cpus * node.core_speed)
        replicas = min(generation.replicas, group.count)
        seconds = 2 * model.active * tokens / (replicas * group.cpus * group.core_speed * flops_of_core)
        needs = model.parameters * generation.weight_bytes + generation.kv_cache_gb * 2**30 + _ENGINE_BYTES
        return Speed(seconds, replicas * group.cpus, group.count * group.cpus, needs, cluster.task_memory(group), False)
    found = []
    for group in groups:
        gpu = group.gpu
        assert gpu is not None
        available = group.count * group.gpus
        replicas = min(generation.replicas, available // generation.tensor)
        room = gpu.memory_gb * 1e9 * generation.gpu_share
        least = generation_bytes(generation, generation.tensor)
        weights = model.parameters * generation.weight_bytes
        free = max(0.0, room * generation.tensor - weights - _ENGINE_BYTES * generation.tensor)
        row = min(generation.max_model_len, assume.prompt_tokens * 2) * kv_bytes(model)
        running = max(1.0, min(generation.running, free / row if row else generation.running))
        read = weights / (generation.tensor * gpu.memory_gb_s * 1e9)
        arithmetic = running * 2 * model.active / (generation.tensor * gpu.bf16_tflops * 1e12)
        step = max(max(read, arithmetic) / assume.decode_efficiency, model.layers * assume.decode_step_s_a_layer)
        decode = generation.completion_tokens / running * step
        prefill = 2 * model.active * generation.prompt_tokens / (generation.tensor * gpu.bf16_tflops * 1e12 * assume.mfu)
        seconds = (decode + prefill) / replicas if replicas else math.inf
        found.append(Speed(seconds, replicas * generation.tensor, available, least, room, True))
    return min(found, key=lambda speed: (not speed.fits, speed.seconds))
