"""A Slurm batch script: Ray on all nodes of one allocation, the run on the first, queued again until it is done.

The nodes are equal and every kind of work runs on all of them, so they advertise no custom resources.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from cluster.manifests.settings import ManifestError, Settings

_BODY = Path(__file__).with_name("slurm.sh")


def slurm(settings: Settings, recipe: str, runs: str) -> str:
    """The script for `sbatch`. `recipe` and `runs` are as all nodes see them: a shared folder, or a URI for the runs.

    Raises ManifestError for a value that would break out of its #SBATCH line.
    """
    chosen = settings.slurm
    options: list[tuple[str, str]] = [
        ("job-name", settings.name), ("nodes", str(chosen.nodes)), ("ntasks-per-node", "1"),
        *([("cpus-per-task", str(chosen.cpus_per_node))] if chosen.cpus_per_node else [("exclusive", "")]),
        *([("gpus-per-node", str(chosen.gpus_per_node))] if chosen.gpus_per_node else []),
        *((name, value) for name, value in (
            ("mem", chosen.memory_per_node), ("time", chosen.time), ("partition", chosen.partition), ("account", chosen.account),
            ("qos", chosen.qos), ("constraint", chosen.constraint), ("reservation", chosen.reservation),
        ) if value),
        ("output", chosen.output), ("open-mode", "append"), ("requeue", ""), ("signal", f"B:USR1@{chosen.warning_s}"),
    ]  # fmt: skip
    for name, value in options:
        if any(character in value for character in "\n\r#\"'"):
            raise ManifestError(f"slurm {name}: {value!r} cannot stand in an #SBATCH line")
    for line in chosen.environment:
        if "\n" in line:
            raise ManifestError(f"slurm.environment: {line!r} is more than one line")
    variables = {
        "RECIPE": recipe,
        "RUNS": runs,
        "DIRECTORY": chosen.directory,
        "INTERFACE": chosen.interface,
        "OBJECT_STORE_BYTES": str(math.floor(chosen.object_store_gib * (1 << 30))),
        "JOIN_S": str(chosen.join_s),
        "REQUEUES": str(chosen.requeues),
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}{'=' if value else ''}{value}" for name, value in options), ""]
    lines += [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in settings.env.items()]
    lines += [f"SRUN=({' '.join(shlex.quote(word) for word in chosen.srun)})"]
    lines += ["environment() {", *(f"    {line}" for line in chosen.environment), "    :", "}"]
    return "\n".join(lines) + "\n" + _BODY.read_text("utf-8")
