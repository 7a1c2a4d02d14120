"""`danlu manifest`: settings and a recipe to the files that bring up a cluster for it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests import containerfile, kuberay, launcher, slurm
from cluster.manifests.overrides import with_overrides
from cluster.manifests.settings import ManifestError, Settings
from cluster.placement import KINDS, Kind
from operators.config import SettingsError
from pipelines.describe import settings_lines
from pipelines.recipe import Recipe, load_recipe

_DASHBOARD = Path(__file__).with_name("grafana.json")


def manifest(parsed: argparse.Namespace) -> str:
    """The text of the manifest that the command line asks for.

    Raises SettingsError for settings that give none, and for a recipe that is needed or cannot be used.
    """
    try:
        return _render(parsed, with_overrides(parsed.settings))
    except ManifestError as error:
        raise SettingsError(str(error)) from None


def _render(parsed: argparse.Namespace, settings: Settings) -> str:
    job = parsed.target == "kuberay" and parsed.kind != "cluster"
    runs = parsed.runs or "runs"
    for option, used in (
        ("kind", parsed.target == "kuberay"),
        ("recipe", parsed.target in ("kuberay", "launcher", "slurm")),
        ("runs", job or parsed.target == "slurm"),
        ("settings", parsed.target not in ("settings", "grafana")),
    ):
        if getattr(parsed, option) and not used:
            name = "set" if option == "settings" else option
            raise SettingsError(f"--{name} says nothing about danlu manifest {parsed.target}")
    if parsed.target == "settings":
        return "\n".join(["settings of `danlu manifest`, for --set PATH=VALUE", *settings_lines(Settings)]) + "\n"
    if parsed.target == "grafana":
        return _DASHBOARD.read_text("utf-8")
    settings.check_used(parsed.target)
    if parsed.target == "containerfile":
        return containerfile.containerfile(settings.container)
    recipe, text = load_recipe(parsed.recipe) if parsed.recipe else (None, "")
    if parsed.target == "slurm":
        if recipe is None:
            raise SettingsError("danlu manifest slurm needs the recipe that the script runs: --recipe RECIPE")
        return slurm.slurm(settings, parsed.recipe, runs)
    if recipe is not None:
        settings = settings.for_kinds(kinds_of(recipe))
    if parsed.target == "launcher":
        hint = f"ray up {settings.name}.yaml    (the file's own path); then danlu submit, through `ray dashboard`"
        return _yaml([launcher.launcher(settings)], hint)
    if not job:
        return _yaml(kuberay.cluster(settings), f"kubectl apply -f FILE    RayCluster {settings.namespace}/{settings.name}")
    if recipe is None:
        raise SettingsError("danlu manifest kuberay needs the recipe that the job runs (--recipe RECIPE), or --kind cluster")
    asked = kuberay.Recipe(os.path.basename(parsed.recipe), text, runs)
    return _yaml(kuberay.job(settings, asked), f"kubectl apply -f FILE    RayJob {settings.namespace}/{settings.name}")


class _Dumper(yaml.SafeDumper):
    """Every value where it belongs, not as an alias of another; text of several lines as it stands."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(objects: list[dict[str, Any]], use: str) -> str:
    body = yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return f"# Written by `danlu manifest`; render it again rather than edit it.\n# {use}\n{body}"


def kinds_of(recipe: Recipe) -> set[Kind]:
    """The kinds of nodes that a recipe's stages work on."""
    found: set[Kind] = set()
    for stage in recipe.stages.values():
        kind = next(kind for kind in KINDS if kind == stage.resource)
        generator = getattr(stage, "generator", None)
        if kind == "generate" and generator is not None and (generator.endpoint is not None or generator.device == "cpu"):
            kind = "cpu"  # another server's GPUs, or none
        found.add(kind)
        if kind == "cpu" and "cuda" in _devices(stage.model_dump(mode="json")):
            found.add("generate")
    return found


def _devices(values: Any) -> Iterator[str]:
    """Every `device` in a stage's settings, of its operators too."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key == "device" and isinstance(value, str):
                yield value
            else:
                yield from _devices(value)
    elif isinstance(values, list):
        for value in values:
            yield from _devices(value)
