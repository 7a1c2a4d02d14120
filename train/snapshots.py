"""Checkpoints of fine-tuning: what is trained, the optimizer and the random states, as safetensors and JSON.

Every worker writes the rows it holds, so a checkpoint never passes through one machine, and any number of workers in any
layout (one process, DDP, FSDP2) reads the rows it needs: a run goes on under another layout. Frozen weights are not
written; they are the base's. Nothing read back can run code.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from cluster import storage
from train import artifacts
from train.parallel import Workers
from train.sharding import local, rows_held

_FILE = re.compile(r"^worker-(\d+)\.safetensors$")


def save(
    destination: str,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    texts: Mapping[str, str],
    workers: Workers,
) -> None:
    """Write a checkpoint directory; `texts` are small files by name. Visible as complete once every worker has written."""

    def write() -> dict[str, int]:
        tensors: dict[str, torch.Tensor] = {}
        rows: dict[str, list[int]] = {}

        def put(key: str, value: torch.Tensor, like: torch.nn.Parameter) -> None:
            first, count = rows_held(like) if value.ndim else (0, 1)
            split = isinstance(like, DTensor) and value.ndim > 0
            if count and (split or workers.first):
                tensors[key] = local(value).detach().to("cpu", copy=True).contiguous()
                rows[key] = [first, count]

        for name, parameter in parameters.items():
            put(f"weight/{name}", parameter, parameter)
            for slot, value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).items():
                put(f"optimizer/{name}/{slot}", torch.as_tensor(value), parameter)
        for key, state in _random_states(workers).items():
            tensors[key] = state
        name = f"worker-{workers.rank:05d}.safetensors"
        scratch = storage.scratch_file(destination.rpartition("/")[0])
        save_file(tensors, scratch, metadata={"rows": json.dumps(rows)})
        sizes = {name: Path(scratch).stat().st_size}
        storage.publish(scratch, storage.join(destination, name))
        for text, content in texts.items() if workers.first else ():
            storage.write_bytes(storage.join(destination, text), content.encode())
            sizes[text] = len(content.encode())
        return sizes

    sizes: dict[str, int] = {}
    for part in workers.gather(workers.together(write)):
        sizes |= part
    marker = json.dumps({"files": sizes}, indent=1, sort_keys=True).encode()
    workers.on_first(lambda: storage.write_bytes(storage.join(destination, artifacts.MARKER), marker))


def load(directory: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
    """Read back the rows that this worker holds. Raises ValueError naming a parameter that the checkpoint lacks rows of."""
    pieces: dict[str, list[tuple[int, int, Any]]] = {}
    for path in sorted(entry for entry in directory.iterdir() if _FILE.match(entry.name)):
        file = safe_open(str(path), framework="pt")
        for key, (first, count) in json.loads((file.metadata() or {}).get("rows", "{}")).items():
            pieces.setdefault(key, []).append((first, count, file))

    def get(key: str, like: torch.nn.Parameter) -> torch.Tensor:
        first, count = rows_held(like)
        found = []
        for start, rows, file in sorted(pieces.get(key, ()), key=lambda piece: piece[0]):
            low, high = max(first, start), min(first + count, start + rows)
            if low < high:
                found.append(file.get_slice(key)[low - start : high - start])
        if sum(len(part) for part in found) != count:
            raise ValueError(
                f"{directory}: rows {first} to {first + count} of {key} are not in the checkpoint; it belongs to other settings"
            )
        return torch.cat(found) if found else torch.empty(0, *like.shape[1:])

    slots: dict[str, list[str]] = {}
    for key in pieces:
        if key.startswith("optimizer/"):
            name, slot = key.removeprefix("optimizer/").rsplit("/", 1)
            slots.setdefault(name, []).append(slot)
    with torch.no_grad():
        for name, parameter in parameters.items():
            local(parameter).copy_(get(f"weight/{name}", parameter))
            for slot in slots.get(name, ()) if optimizer is not None else ():
                key = f"optimizer/{name}/{slot}"
                _, _, file = pieces[key][0]
                if not file.get_slice(key).get_shape():  # the number of steps
                    value = file.get_tensor(key)
                else:
                    value = get(key, parameter).to(local(parameter).device, parameter.dtype)
                    if isinstance(parameter, DTensor):
                        value = DTensor.from_local(
                            value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
                        )
                assert optimizer is not None
                optimizer.state[parameter][slot] = value


def load_random_states(directory: Path, workers: Workers) -> None:
    """Set this worker's random generators as they were; a worker that did not exist then keeps what it has."""
    path = directory / f"worker-{workers.rank:05d}.safetensors"
    if not path.exists():
        return
    with safe_open(str(path), framework="pt") as file:
        torch.set_rng_state(file.get_tensor("random/cpu"))
        if workers.device.type == "cuda" and "random/cuda" in file.keys():  # noqa: SIM118  safe_open is no mapping
            torch.cuda.set_rng_state(file.get_tensor("random/cuda"), workers.device)
        words = file.get_tensor("random/python").tolist()
        random.setstate((3, tuple(words), None))
        words = file.get_tensor("random/numpy").tolist()
        np.random.set_state(("MT19937", np.array(words[:-1], np.uint32), words[-1], 0, 0.0))


def _random_states(workers: Workers) -> dict[str, torch.Tensor]:
    _, words, position, _, _ = np.random.get_state(legacy=True)  # type: ignore[misc]
    states = {
        "random/cpu": torch.get_rng_state(),
        "random/python": torch.tensor(random.getstate()[1]),
        "random/numpy": torch.tensor([*map(int, words), int(position)]),
    }
    if workers.device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(workers.device)
    return states
