"""`danlu plan`: descriptions read from files, the plan as a table with its warnings, or as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cluster import rates as cluster_rates
from cluster import storage
from cluster.machines import PROFILES, Cluster
from cluster.plan import Plan, StagePlan, Warned, plan
from cluster.rates import Rates
from operators.config import SettingsError, nearest, parse
from pipelines.planning.estimate import estimates
from pipelines.planning.texts import Language, many, size, span, told, word
from pipelines.recipe import Recipe


def load_cluster(name: str) -> Cluster:
    """A profile by its name, or a description in a YAML file (a local path or URI). Raises SettingsError, FileNotFoundError."""
    profile = PROFILES / f"{name}.yaml"
    if not profile.is_file() and not storage.exists(name):
        valid = sorted(path.stem for path in PROFILES.glob("*.yaml"))
        raise SettingsError(f"--cluster {name}: neither a file nor a profile{nearest(name, valid)}")
    return _read(Cluster, str(profile) if profile.is_file() else name)


def load_rates(path: str | None) -> Rates:
    """The rates of a file, or those that come along. Raises SettingsError, FileNotFoundError."""
    if path is not None and not storage.exists(path):
        raise FileNotFoundError(f"--rates {path}: no such file; `danlu rates --out {path}` measures one")
    return _read(Rates, path or str(cluster_rates.DEFAULT))


def _read(model: type[Any], path: str) -> Any:
    try:
        values = yaml.safe_load(storage.read_bytes(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must be a mapping")
    return parse(model, values, path)


def write_rates(rates: Rates, path: str) -> None:
    """Write a rates file, which `load_rates` reads."""
    data = rates.model_dump(mode="json", by_alias=True, exclude={"assumptions"})
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    storage.write_bytes(path, text.encode())


def make_plan(recipe: Recipe, runs: str, base_directory: str, cluster: Cluster, rates: Rates, limit: int | None) -> Plan:
    """The plan of a recipe on a cluster. Raises SettingsError."""
    found = estimates(recipe, storage.absolute(runs, base_directory), base_directory, rates, limit)
    laid = plan(found, cluster, rates)
    remote = storage.is_remote(storage.absolute(runs, base_directory))
    if cluster.storage.kind == "object_store" and cluster.node_count > 1 and not remote:
        laid = dataclasses.replace(laid, warnings=(Warned("runs_local", "", {"nodes": cluster.node_count}), *laid.warnings))
    return laid


def pieces(laid: Plan, rates: Rates, default_rates: bool, language: Language) -> list[RenderableType]:
    """What the command prints, one after the other."""
    cluster = laid.cluster
    kind = word(cluster.storage.kind, language)
    described = {"name": cluster.description or cluster.name, "nodes": cluster.node_count, "cores": f"{cluster.cores:,}"}
    shown: list[RenderableType] = [
        Text(word("cluster", language, **described, gpus=cluster.gpus, storage=kind)),
        _table(laid, language),
    ]
    total = "total_partly" if laid.unknown else "total"
    facts = {"time": span(laid.seconds, language), "disk": size(laid.written_bytes), "peak": size(laid.peak_bytes)}
    shown.append(Text(word(total, language, **facts)))
    command = "command_train" if laid.train_workers else "command"
    shown.append(Text(word(command, language, workers=laid.workers, train=laid.train_workers)))
    machine, _, _ = rates.machine.partition("\n")
    shown.append(Text(word("rates", language, machine=machine, date=rates.date, command=rates.command)))
    if default_rates:
        shown.append(Text(word("own_rates", language)))
    for name in ("assumed", "measured"):
        lines = [_ratios(each, name) for each in laid.stages if getattr(each.estimate, name)]
        if lines:
            shown.append(Text(f"{word(name, language)}: " + "; ".join(lines), style="dim"))
    warnings = [*laid.warnings, *(warned for each in laid.stages for warned in each.warnings)]
    shown.append(Text(word("warnings" if warnings else "no_warnings", language) + (":" if warnings else "")))
    shown += [Text(f"  {told(warned, language)}", style="yellow") for warned in warnings]
    return shown


def _ratios(stage: StagePlan, name: str) -> str:
    pairs = getattr(stage.estimate, name)
    return f"{stage.estimate.name} " + ", ".join(f"{key} {value:.3g}" for key, value in pairs)


def _table(laid: Plan, language: Language) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("stage", "kind"):
        table.add_column(word(name, language), no_wrap=True)
    for name in ("rows", "units", "at_once", "task", "shuffled", "disk", "tokens", "time"):
        table.add_column(word(name, language), justify="right", no_wrap=True)
    for stage in laid.stages:
        each = stage.estimate
        if each.done:
            taken = f"{word('done', language)} ({span(each.seconds_taken, language)})"
            cells = [many(each.rows_out), "–", "–", "–", "–", size(each.written_bytes), _count(each.tokens), taken]
        elif each.unknown is not None:
            cells = [_count(each.rows_out), *["?"] * 4, size(each.written_bytes or None), _count(each.tokens), "?"]
        else:
            task = f"{stage.cpus:g} {stage.gpus:g} {size(stage.memory)}" if stage.units else "–"
            cells = [
                _count(each.rows_out), f"{stage.units:,.0f}" if stage.units else "–",
                f"{stage.at_once:,.0f}" if stage.units else "–", task,
                size(each.shuffled_bytes) if each.shuffled_bytes else "–", size(each.written_bytes), _count(each.tokens),
                span(stage.seconds, language),
            ]  # fmt: skip
        table.add_row(each.name, each.kind, *cells, style="dim" if each.done else "")
    return table


def _count(value: float | None) -> str:
    return "–" if value is None else many(value)


def as_json(laid: Plan, rates: Rates, language: Language) -> dict[str, Any]:
    """The plan with every number; durations in seconds, sizes in bytes."""
    return {
        "cluster": laid.cluster.name,
        "seconds": laid.seconds,
        "written_bytes": laid.written_bytes,
        "peak_bytes": laid.peak_bytes,
        "unknown": list(laid.unknown),
        "workers": laid.workers,
        "train_workers": laid.train_workers,
        "rates": {"machine": rates.machine, "date": rates.date, "command": rates.command},
        "stages": [_stage_json(stage, language) for stage in laid.stages],
        "warnings": [_warning_json(warned, language) for warned in laid.warnings],
    }


def _stage_json(stage: StagePlan, language: Language) -> dict[str, Any]:
    each = stage.estimate
    return {
        "stage": each.name, "kind": each.kind, "done": each.done, "unknown": each.unknown, "rows_in": each.rows_in,
        "rows_out": each.rows_out, "units": stage.units, "at_once": stage.at_once, "cpus": stage.cpus, "gpus": stage.gpus,
        "memory_bytes": stage.memory, "read_bytes": each.read_bytes, "shuffled_bytes": each.shuffled_bytes,
        "written_bytes": each.written_bytes, "tokens": each.tokens, "seconds": each.seconds_taken if each.done else stage.seconds,
        "begins": stage.begins, "phases": [dataclasses.asdict(phase) for phase in each.phases], "assumed": dict(each.assumed),
        "measured": dict(each.measured), "warnings": [_warning_json(warned, language) for warned in stage.warnings],
    }  # fmt: skip


def _warning_json(warned: Warned, language: Language) -> dict[str, Any]:
    return {"code": warned.code, "stage": warned.stage, "facts": warned.facts, "text": told(warned, language)}
