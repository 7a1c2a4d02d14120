"""Checkpoints: directories `step-NNNNNNNN` under one root, visible whole or not at all, the newest two kept.

Everything is safetensors and JSON: nothing read back can run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cluster import storage
from train import artifacts

_NAME = re.compile(r"^(?:step|checkpoint)-(\d+)$")
KEEP = 2


def listing(root: str) -> dict[int, str]:
    """The checkpoints below `root` by step, complete or not."""
    filesystem, inner = storage.resolve(root)
    if not storage.exists(root):
        return {}
    found = {}
    for entry in filesystem.get_file_info(storage.pafs.FileSelector(inner)):
        match = _NAME.match(entry.base_name)
        if match and entry.type == storage.pafs.FileType.Directory:
            found[int(match[1])] = storage.join(root, entry.base_name)
    return found


def latest(root: str) -> tuple[int, Path] | None:
    """The newest complete checkpoint as (step, directory on this machine), None when there is none."""
    for step, path in sorted(listing(root).items(), reverse=True):
        if artifacts.is_complete(path):
            return step, artifacts.local_directory(path)
    return None


@contextmanager
def saving(root: str, step: int) -> Iterator[Path]:
    """A directory to write one checkpoint into; when the block ends it is in force and the oldest ones are deleted."""
    with artifacts.building(storage.join(root, f"step-{step:08d}")) as directory:
        yield directory
    prune(root)


def prune(root: str) -> None:
    """Delete all but the newest KEEP complete checkpoints, and incomplete ones older than those."""
    found = listing(root)
    complete = sorted((step for step, path in found.items() if artifacts.is_complete(path)), reverse=True)[:KEEP]
    for step, path in found.items():
        if complete and step not in complete and step < complete[0]:
            storage.delete(path)


def save_optimizer(optimizer: torch.optim.Optimizer, names: dict[int, str], path: Path) -> None:
    """Write an optimizer's state as safetensors, keyed `name/slot`. `names` maps id(parameter) to its name."""
    tensors = {}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
            tensors[f"{names[id(parameter)]}/{slot}"] = tensor.detach().cpu().contiguous().clone()
    save_file(tensors, path)


def load_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], path: Path) -> None:
    """Read back what save_optimizer wrote. Raises KeyError when a parameter is not in the model."""
    for key, tensor in load_file(path).items():
        name, slot = key.rsplit("/", 1)
        parameter = parameters[name]
        optimizer.state[parameter][slot] = tensor if slot == "step" else tensor.to(parameter.device, parameter.dtype)


def save_random_states(states: dict[str, torch.Tensor], path: Path) -> None:
    """Write generator states (uint8 tensors) keyed `rank/device`."""
    save_file({key: value.cpu().contiguous() for key, value in states.items()}, path)


def load_random_states(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def read_state(directory: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint."""
    return dict(json.loads((directory / "state.json").read_text()))


def write_state(directory: Path, state: dict[str, Any]) -> None:
    (directory / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))
