"""How long stages take on a cluster, what they need, and what does not fit: arithmetic over plain estimates.

The estimates come from whoever knows the recipe (pipelines.planning); nothing here knows of stages' kinds. A stage is a
sequence of phases of like tasks, or training, or generation. Durations follow from rates of one core (cluster.rates), the
description of a cluster (cluster.machines) and nothing else: twice the work takes twice as long, more nodes are never slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster import fit
from cluster.fit import Generation, Training
from cluster.machines import Cluster
from cluster.rates import Rates


@dataclass(frozen=True)
class Phase:
    """Tasks of one kind. `core_seconds` are those of all units together on a core of speed 1; `small_reads` are requests that
    wait for the storage one after the other within a task, over all units. `memory` is bytes of one task."""

    name: str
    units: float
    core_seconds: float
    memory: float
    cpus: float = 1.0
    gpus: float = 0.0
    small_reads: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """One stage before it is laid on a cluster. Bytes and tokens are None where they cannot be known.

    `done`: it has finished, `seconds_taken` then is what it took. `unknown` says why there is no estimate. `assumed` and
    `measured` name the ratios that went in, as (name, value).
    """

    name: str
    kind: str
    resource: str  # cpu, generate, train
    inputs: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()
    training: Training | None = None
    generation: Generation | None = None
    rows_in: float | None = None
    rows_out: float | None = None
    read_bytes: float = 0.0
    written_bytes: float = 0.0  # what stays
    shuffled_bytes: float = 0.0  # written, read once and deleted
    scratch_bytes: float = 0.0  # there while the stage runs: checkpoints
    tokens: float | None = None
    waits_s: float = 0.0  # fixed: an endpoint's limit, say
    done: bool = False
    seconds_taken: float | None = None
    unknown: str | None = None
    assumed: tuple[tuple[str, Any], ...] = ()
    measured: tuple[tuple[str, Any], ...] = ()
    needs_ray: bool = True


@dataclass(frozen=True)
class Warned:
    """Something that does not fit or is wasted. `code` names the text, `facts` are what it speaks of."""

    code: str
    stage: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StagePlan:
    """A stage on the cluster. `seconds` is None where nothing is known of its input, or it cannot run; `begins` counts from the
    run's start."""

    estimate: Estimate
    units: float
    at_once: float  # tasks that run at the same time, of the phase with most work
    cpus: float
    gpus: float
    memory: float  # bytes of the largest task or worker
    seconds: float | None
    overhead: float
    begins: float | None
    warnings: tuple[Warned, ...]

    @property
    def disk_bytes(self) -> float:
        return self.estimate.written_bytes


@dataclass(frozen=True)
class Plan:
    """All stages, and what the run needs as a whole. `seconds` counts what is known; `unknown` names the stages that are not."""

    cluster: Cluster
    stages: tuple[StagePlan, ...]
    seconds: float
    written_bytes: float
    peak_bytes: float
    unknown: tuple[str, ...]
    workers: int
    train_workers: int
    warnings: tuple[Warned, ...]


def capacities(phase: Phase, cluster: Cluster) -> list[tuple[int, float]]:
    """(tasks at once, speed of a core) of each group of nodes, fastest first: bounded by cores, GPUs and memory of a node."""
    found = []
    for group in sorted(cluster.nodes, key=lambda group: -group.core_speed):
        bounds = [group.cpus / phase.cpus if phase.cpus else float(group.cpus)]
        if phase.gpus:
            bounds.append(group.gpus / phase.gpus)
        if phase.memory:
            bounds.append(cluster.task_memory(group) / phase.memory)
        found.append((group.count * math.floor(min(bounds)), group.core_speed))
    return found


def phase_seconds(phase: Phase, cluster: Cluster, rates: Rates) -> float | None:
    """Seconds of a phase; None where not one of its tasks fits on a node. Units of a phase are taken to be equally large."""
    if not phase.units:
        return 0.0
    left, speed, used = phase.units, 0.0, 0.0
    for count, core_speed in capacities(phase, cluster):
        taken = min(left, count)
        speed, used, left = speed + taken * core_speed, used + taken, left - taken
    if not used:
        return None
    waiting = (phase.small_reads * cluster.storage.latency_ms / 1e3 + phase.units * rates.task_s) / used
    return phase.core_seconds / speed + waiting


def lay(estimate: Estimate, cluster: Cluster, rates: Rates) -> StagePlan:
    """One stage on a cluster, without its place in time."""
    warnings: list[Warned] = []
    name = estimate.name
    if estimate.done or estimate.unknown is not None:
        if estimate.unknown is not None and not estimate.done:
            warnings.append(Warned("unknown", name, {"why": estimate.unknown}))
        return StagePlan(estimate, 0, 0, 0, 0, 0, 0.0 if estimate.done else None, 0.0, None, tuple(warnings))
    if estimate.training is not None:
        return _lay_training(estimate, estimate.training, cluster, rates)
    if estimate.generation is not None:
        return _lay_generation(estimate, estimate.generation, cluster, rates)
    seconds: float | None = estimate.waits_s
    for phase in estimate.phases:
        taken = phase_seconds(phase, cluster, rates)
        if taken is None:
            most = max(cluster.task_memory(group) for group in cluster.nodes)
            if phase.gpus and cluster.gpus == 0:
                warnings.append(Warned("needs_gpu", name, {"phase": phase.name}))
            elif phase.units == 1:
                warnings.append(Warned("last_step", name, {"phase": phase.name, "needs": phase.memory, "has": most}))
            else:
                warnings.append(Warned("task_memory", name, {"phase": phase.name, "needs": phase.memory, "has": most}))
            taken = phase.core_seconds / max(1.0, min(phase.units, cluster.cores))
        seconds = (seconds or 0.0) + taken
    moved = estimate.read_bytes + estimate.written_bytes + 2 * estimate.shuffled_bytes
    seconds = max(seconds or 0.0, moved / cluster.storage_bytes_s(rates.disk_mb_s))
    busiest = max(estimate.phases, key=lambda phase: phase.core_seconds, default=None)
    if busiest is None:
        return StagePlan(estimate, 0, 0, 0, 0, 0, seconds, 0.0, None, tuple(warnings))
    room = sum(count for count, _ in capacities(busiest, cluster))
    by_cores = sum(count for count, _ in capacities(Phase("", 1, 0, 0, busiest.cpus, busiest.gpus), cluster))
    at_once = min(busiest.units, room)
    if 0 < busiest.units < by_cores and busiest.core_seconds > 60:
        warnings.append(Warned("few_units", name, {"units": busiest.units, "cores": by_cores, "phase": busiest.name}))
    if 0 < room < min(by_cores, busiest.units):
        warnings.append(
            Warned("memory_limits", name, {"phase": busiest.name, "needs": busiest.memory, "at_once": room, "cores": by_cores})
        )
    overhead = rates.first_task_s if estimate.needs_ray else 0.0
    units = sum(phase.units for phase in estimate.phases)
    memory = max(phase.memory for phase in estimate.phases)
    return StagePlan(
        estimate, units, at_once, busiest.cpus, busiest.gpus, memory, seconds + overhead, overhead, None, tuple(warnings)
    )


def _lay_training(estimate: Estimate, training: Training, cluster: Cluster, rates: Rates) -> StagePlan:
    speed = fit.train_speed(training, cluster, rates)
    name, warnings = estimate.name, list[Warned]()
    if not speed.on_gpu and training.needs_gpu:
        warnings.append(Warned("needs_gpu", name, {"phase": "train"}))
    if not speed.on_gpu and speed.seconds > 86_400:
        warnings.append(Warned("cpu_training", name, {"days": speed.seconds / 86_400}))
    if speed.on_gpu and not speed.devices:
        warnings.append(Warned("no_layout", name, {"tensor": training.tensor, "gpus": speed.available, "batch": training.batch}))
    elif not speed.fits:
        facts = {"needs": speed.needs_bytes, "has": speed.has_bytes, "layout": str(fit.layout_of(training))}
        found = None
        if speed.on_gpu:
            gpus = [(group.gpu, group.count * group.gpus) for group in cluster.nodes if group.gpu and group.gpus]
            options = ((gpu, pair) for gpu, n in gpus for pair in fit.fitting(training, n, gpu, rates.assumptions.activation_bytes))
            found = next(options, None)
        if found is not None:
            warnings.append(Warned("model_too_large", name, {**facts, "fits": str(found[1][0]), "gpus": found[1][1]}))
        else:
            warnings.append(Warned("model_fits_nowhere", name, facts))
    elif speed.on_gpu and speed.devices < speed.available and not training.spread:
        most = fit.usable_workers(training, speed.available, training.tensor)
        code = "idle_gpus" if most == speed.devices else "network_leaves_out"
        facts = {"used": speed.devices, "available": speed.available, "batch": training.batch}
        warnings.append(Warned(code, name, facts))
    if speed.network_bound:
        warnings.append(Warned("network_bound", name, {}))
    moved = (estimate.read_bytes + estimate.written_bytes) / cluster.storage_bytes_s(rates.disk_mb_s)
    seconds = max(speed.seconds, moved) + rates.train_start_s if math.isfinite(speed.seconds) else None
    workers = speed.devices if speed.on_gpu else max(1, speed.devices // max(1, min(group.cpus for group in cluster.nodes)))
    cpus = 1.0 if speed.on_gpu else float(speed.devices) / workers
    return StagePlan(
        estimate, workers, workers, cpus, 1.0 if speed.on_gpu else 0.0, speed.needs_bytes, seconds, rates.train_start_s, None,
        tuple(warnings),
    )  # fmt: skip


def _lay_generation(estimate: Estimate, generation: Generation, cluster: Cluster, rates: Rates) -> StagePlan:
    speed = fit.generate_speed(generation, cluster, rates)
    name, warnings = estimate.name, list[Warned]()
    if generation.device == "gpu" and not speed.on_gpu:
        warnings.append(Warned("needs_gpu", name, {"phase": "generate"}))
    if speed.on_gpu and not speed.devices:
        warnings.append(Warned("engine_gpus", name, {"tensor": generation.tensor, "gpus": speed.available}))
    elif not speed.fits:
        gpus = [group.gpu for group in cluster.nodes if group.gpu and group.gpus]
        tensor = next((n for n in (fit.fitting_tensor(generation, gpu) for gpu in gpus) if n is not None), None)
        facts = {"needs": speed.needs_bytes, "has": speed.has_bytes, "tensor": generation.tensor}
        if speed.on_gpu and tensor is not None:
            warnings.append(Warned("engine_too_large", name, {**facts, "fits": tensor}))
        else:
            warnings.append(Warned("engine_fits_nowhere", name, facts))
    elif speed.on_gpu and speed.devices < speed.available and speed.seconds > 600:
        replicas = speed.available // generation.tensor
        warnings.append(Warned("idle_engines", name, {"used": speed.devices, "available": speed.available, "replicas": replicas}))
    replicas = max(1, speed.devices // generation.tensor) if speed.on_gpu else generation.replicas
    seconds = speed.seconds + estimate.waits_s + rates.engine_start_s if math.isfinite(speed.seconds) else None
    gpus_each = float(generation.tensor) if speed.on_gpu else 0.0
    cpus = 1.0 if speed.on_gpu else float(speed.devices) / max(1, replicas)
    return StagePlan(
        estimate, replicas, replicas, cpus, gpus_each, speed.needs_bytes, seconds, rates.engine_start_s, None, tuple(warnings)
    )


def plan(estimates: Sequence[Estimate], cluster: Cluster, rates: Rates) -> Plan:
    """Lay stages on a cluster. `estimates` come in an order in which inputs are before what reads them.

    Stages of one resource follow each other in that order, as the runner has it; those of different resources run beside
    each other. Engines and training workers are started once.
    """
    free: dict[str, float] = {}
    ends: dict[str, float] = {}
    started: set[str] = set()
    found: list[StagePlan] = []
    start = rates.ray_start_s if any(not each.done and each.needs_ray for each in estimates) else 0.0
    for estimate in estimates:
        laid = lay(estimate, cluster, rates)
        seconds = laid.seconds or 0.0
        if estimate.done:
            ends[estimate.name] = 0.0
            found.append(_placed(laid, 0.0, None))
            continue
        if estimate.resource in started and laid.seconds is not None:  # its processes are warm
            seconds -= laid.overhead
            seconds += rates.stage_s if estimate.resource == "cpu" and laid.overhead else 0.0
        elif laid.overhead:
            started.add(estimate.resource)
        begins = max([start, free.get(estimate.resource, start), *(ends.get(name, 0.0) for name in estimate.inputs)])
        ends[estimate.name] = free[estimate.resource] = begins + seconds
        found.append(_placed(laid, None if laid.seconds is None else seconds, begins))
    written = sum(each.estimate.written_bytes for each in found if not each.estimate.done)
    peak, before = 0.0, 0.0
    for each in found:
        if not each.estimate.done:
            peak = max(peak, before + each.estimate.written_bytes + each.estimate.shuffled_bytes + each.estimate.scratch_bytes)
            before += each.estimate.written_bytes
    training = [each for each in found if each.estimate.training is not None and not each.estimate.done]
    common = _common_workers([each for each in training if each.units])
    return Plan(
        cluster, tuple(found), max(ends.values(), default=0.0), written, peak,
        tuple(each.estimate.name for each in found if each.seconds is None),
        cluster.cores, common, tuple(_of_the_run(cluster, peak, found)),
    )  # fmt: skip


def _placed(laid: StagePlan, seconds: float | None, begins: float | None) -> StagePlan:
    return StagePlan(
        laid.estimate, laid.units, laid.at_once, laid.cpus, laid.gpus, laid.memory, seconds, laid.overhead, begins, laid.warnings
    )


def _common_workers(training: Sequence[StagePlan]) -> int:
    """One group of workers runs all training stages: the largest that every one's batch divides among."""
    if not training:
        return 0
    least = int(min(each.units for each in training))
    return next((n for n in range(least, 0, -1) if all(_divides(each, n) for each in training)), 1)


def _divides(each: StagePlan, workers: int) -> bool:
    training = each.estimate.training
    assert training is not None
    return workers % training.tensor == 0 and training.divides(workers // training.tensor)


def _of_the_run(cluster: Cluster, peak: float, stages: Sequence[StagePlan]) -> list[Warned]:
    warnings = []
    free = cluster.free_bytes
    if free is not None and peak > free:
        warnings.append(Warned("disk", "", {"needs": peak, "has": free}))
    if cluster.storage.kind == "local" and cluster.node_count > 1:
        warnings.append(Warned("runs_local", "", {"nodes": cluster.node_count}))
    for group in cluster.nodes:
        # every training node keeps a copy of the packed tokens that it maps into memory
        training = [each.estimate for each in stages if each.estimate.training and not each.estimate.done]
        packed = max((each.read_bytes for each in training), default=0.0)
        if cluster.storage.kind != "local" and packed > group.disk_gb * 1e9:
            warnings.append(Warned("node_disk", "", {"group": group.name, "needs": packed, "has": group.disk_gb * 1e9}))
    return warnings
