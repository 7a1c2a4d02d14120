"""Checkpoints of pretraining and fine-tuning: directories `step-NNNNNNNN` under one root, visible whole or not at all, the
newest few kept.

Every worker writes the parts of weights and optimizer that it holds to a safetensors file of its own, so nothing passes
through one machine; `index.json` says where the parts of each tensor are. Whoever reads takes just what it needs, by
ranges, so that a run goes on with another number of workers under another layout. Writing goes on in a thread while
training does; `complete.json` is written when all workers are done. A root may be a URI.

Everything is safetensors and JSON: nothing read back can run code. (torch's own distributed checkpoints keep their
metadata as a pickle.)
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file as load_file
from safetensors.torch import save_file as save_file
from torch.distributed.tensor import DTensor

from cluster import storage
from train import artifacts
from train.layout import box, held
from train.parallel import Workers

_NAME = re.compile(r"^step-(\d+)$")
KEEP = 2
INDEX, STATE = "index.json", "state.json"

_TYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_BY_NAME = {name: dtype for dtype, name in _TYPES.items()}

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, size) of a part of a tensor."""


def listing(root: str) -> dict[int, str]:
    """The checkpoints below `root` by step, complete or not."""
    named = ((_NAME.match(path.rsplit("/", 1)[1]), path) for path in storage.list_directories(root))
    return {int(match[1]): path for match, path in named if match}


def newest(root: str) -> tuple[int, str] | None:
    """The newest complete checkpoint as (step, directory or URI), None when there is none."""
    for step, path in sorted(listing(root).items(), reverse=True):
        if artifacts.is_complete(path):
            return step, path
    return None


def latest(root: str) -> tuple[int, Path] | None:
    """The newest complete checkpoint as (step, directory on this machine), None when there is none."""
    found = newest(root)
    return None if found is None else (found[0], artifacts.local_directory(found[1]))


def prune(root: str, keep: int = KEEP) -> None:
    """Delete all but the newest `keep` complete checkpoints, and incomplete ones older than those."""
    found = listing(root)
    complete = sorted((step for step, path in found.items() if artifacts.is_complete(path)), reverse=True)[:keep]
    for step, path in found.items():
        if complete and step not in complete and step < complete[0]:
            storage.delete(path)


@contextmanager
def saving(root: str, step: int) -> Iterator[Path]:
    """A directory that one worker writes a small checkpoint into; when the block ends it is in force and old ones are deleted."""
    with artifacts.building(storage.join(root, f"step-{step:08d}")) as directory:
        yield directory
    prune(root)


def read_state(directory: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint."""
    return dict(json.loads((directory / STATE).read_text("utf-8")))


def write_state(directory: Path, state: dict[str, Any]) -> None:
    (directory / STATE).write_text(json.dumps(state, indent=1, sort_keys=True), "utf-8")


def slots(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, tuple[torch.Tensor, torch.nn.Parameter]]:
    """What a checkpoint holds, by key, each with the parameter it lies like: `weight/NAME` and `optimizer/NAME/SLOT`."""
    found: dict[str, tuple[torch.Tensor, torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        found[f"weight/{name}"] = (parameter.detach(), parameter)
        for slot, value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).items():
            found[f"optimizer/{name}/{slot}"] = (torch.as_tensor(value), parameter)
    return found


def generators(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of this worker's random generators: torch's, Python's and NumPy's."""
    _, words, position, _, _ = np.random.get_state(legacy=True)  # type: ignore[misc]
    states = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.tensor([*map(int, words), int(position)]),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set this worker's random generators as they were; one whose state is not there keeps what it has."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if "python" in states:
        random.setstate((3, tuple(states["python"].tolist()), None))
    if "numpy" in states:
        words = states["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(words[:-1], np.uint32), words[-1], 0, 0.0))


@dataclass
class _Pending:
    directory: str
    step: int
    written: Future[dict[str, Any]]
    state: dict[str, Any]


class Writer:
    """Writes checkpoints of one job in the background, one at a time.

    The parts of a weight that several workers hold are written by one of them, so that each writes about as much. All
    workers must construct one together, with the same parameters. `state_file` is what the plain data is called.
    """

    def __init__(
        self,
        root: str,
        parameters: Mapping[str, torch.nn.Parameter],
        workers: Workers,
        keep: int = KEEP,
        state_file: str = STATE,
    ) -> None:
        self.root, self.workers, self.keep, self.state_file = root, workers, keep, state_file
        self._mine = _ownership(parameters, workers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def busy(self) -> bool:
        """True between the start of a checkpoint and the moment it is in force."""
        return self._pending is not None

    @property
    def written(self) -> bool:
        """True when this worker's part of the pending checkpoint has been written, or has failed."""
        return self._pending is not None and self._pending.written.done()

    def start(
        self,
        step: int,
        tensors: Mapping[str, tuple[torch.Tensor, torch.nn.Parameter]],
        state: dict[str, Any],
        random_states: Mapping[str, torch.Tensor],
        name: str | None = None,
    ) -> None:
        """Copy what this worker writes, then write it in the background. Waits for an earlier checkpoint. All take part.

        `state` is plain data, the same on every worker, `random_states` are this worker's `generators`. A checkpoint with
        a `name` of its own is none that a run goes on from, and is not deleted with those.
        """
        self.finish()
        parts: dict[str, torch.Tensor] = {}
        boxes: dict[str, dict[str, Any]] = {}
        for key, (tensor, parameter) in tensors.items():
            if key.split("/", 2)[1] not in self._mine:
                continue
            scalar = tensor.ndim == 0
            offset, size = ((), ()) if scalar else box(parameter)
            if math.prod(size) == 0:
                continue
            parts[key] = self._copied(key, held(tensor))
            boxes[key] = {"shape": [] if scalar else list(parameter.shape), "offset": list(offset), "size": list(size)}
        if self.workers.device.type == "cuda":
            torch.cuda.current_stream(self.workers.device).synchronize()
        parts |= {f"random/{generator}": value.clone() for generator, value in random_states.items()}
        directory = storage.join(self.root, name or f"step-{step:08d}")
        # What an interrupted attempt left must not look complete while its files are replaced.
        self.workers.on_first(lambda: storage.delete(directory))
        file = f"worker-{self.workers.rank:05d}.safetensors"
        written = self._thread.submit(_write, directory, file, parts, boxes)
        self._pending = _Pending(directory, step, written, state)

    def _copied(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """A copy on the host; buffers are kept from one checkpoint to the next (pinned where the copy is from a GPU)."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
            self._buffers[key] = buffer
        return buffer.copy_(value, non_blocking=True)

    def finish(self) -> None:
        """Wait until the pending checkpoint is written by all workers and put it in force. All take part.

        Raises what went wrong in writing.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        parts = self.workers.gather(self.workers.together(pending.written.result))

        def complete() -> None:
            index: dict[str, Any] = {"workers": len(parts), "tensors": {}}
            for part in parts:
                for key, entry in part["tensors"].items():
                    index["tensors"].setdefault(key, []).append({"file": part["file"], **entry})
            texts = {INDEX: json.dumps(index), self.state_file: json.dumps(pending.state, sort_keys=True)}
            sizes = {part["file"]: part["bytes"] for part in parts}
            for name, text in texts.items():
                storage.write_bytes(storage.join(pending.directory, name), text.encode())
                sizes[name] = len(text.encode())
            marker = json.dumps({"files": sizes}, indent=1, sort_keys=True).encode()
            storage.write_bytes(storage.join(pending.directory, artifacts.MARKER), marker)
            prune(self.root, self.keep)

        self.workers.on_first(complete)

    def close(self) -> None:
        """End the thread; a checkpoint that is being written is left without its marker."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _ownership(parameters: Mapping[str, torch.nn.Parameter], workers: Workers) -> set[str]:
    """The names of the parameters whose part on this worker is this worker's to write."""
    mine = {name: (box(parameter), held(parameter).numel()) for name, parameter in parameters.items()}
    everyone = workers.gather(mine)
    load = [0] * workers.world
    owned: set[str] = set()
    for name in mine:
        holders: dict[Box, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            holders.setdefault(theirs[name][0], []).append(rank)
        for ranks in holders.values():
            owner = min(ranks, key=lambda rank: (load[rank], rank))
            load[owner] += everyone[owner][name][1]
            if owner == workers.rank:
                owned.add(name)
    return owned


def _write(directory: str, file: str, parts: Mapping[str, torch.Tensor], boxes: Mapping[str, Any]) -> dict[str, Any]:
    """Write one worker's file and say where in it each part lies."""
    destination = storage.join(directory, file)
    header, offsets, position = {}, {}, 0
    for key, tensor in parts.items():
        length = tensor.numel() * tensor.element_size()
        name = _TYPES[tensor.dtype]
        header[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [position, position + length]}
        offsets[key] = (position, name)
        position += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if storage.is_remote(destination):  # a single upload, which the store makes visible at its end
        size = 8 + len(text) + position
        storage.upload(destination, size, lambda stream: _write_file(stream, text, parts))
    else:
        scratch = storage.scratch_file(directory.rpartition("/")[0])
        with open(scratch, "wb") as local:
            size = _write_file(local, text, parts)
        storage.publish(scratch, destination)
    base = 8 + len(text)
    tensors = {key: {**boxes[key], "begin": base + begin, "dtype": name} for key, (begin, name) in offsets.items() if key in boxes}
    return {"file": file, "bytes": size, "tensors": tensors}


def _write_file(stream: Any, header: bytes, parts: Mapping[str, torch.Tensor]) -> int:
    """Write a safetensors file to a binary stream; its size in bytes."""
    stream.write(len(header).to_bytes(8, "little") + header)
    size = 8 + len(header)
    for tensor in parts.values():
        # Without a copy, and without Python's lock while the disk is waited for.
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        stream.write(data)
        size += data.nbytes
    return size


class Reader:
    """A complete checkpoint, read by ranges. Raises ValueError when its index is damaged."""

    def __init__(self, directory: str, state_file: str = STATE) -> None:
        self.directory = directory
        self.state: dict[str, Any] = json.loads(storage.read_bytes(storage.join(directory, state_file)))
        index = json.loads(storage.read_bytes(storage.join(directory, INDEX)))
        self.workers = int(index["workers"])
        self._parts: dict[str, list[dict[str, Any]]] = index["tensors"]
        self._streams: dict[str, Any] = {}

    def keys(self) -> Sequence[str]:
        return list(self._parts)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._parts[key][0]["shape"])

    def read(self, key: str, offset: Sequence[int] = (), size: Sequence[int] = ()) -> torch.Tensor:
        """A part of a tensor, put together from the parts on file. Raises ValueError when some of it is not there."""
        parts = self._parts.get(key, [])
        dtype = _BY_NAME[parts[0]["dtype"]] if parts else torch.float32
        found = torch.empty(tuple(size), dtype=dtype)
        missing = found.numel()
        for part in parts if found.ndim else parts[:1]:  # each worker with a part of a weight wrote its number of steps
            low = [max(a, b) for a, b in zip(offset, part["offset"], strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, size, part["offset"], part["size"], strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            inside = [(a - start, b - start) for a, b, start in zip(low, high, part["offset"], strict=True)]
            piece = self._range(part, dtype, inside)
            found[tuple(slice(a - start, b - start) for a, b, start in zip(low, high, offset, strict=True))] = piece
            missing -= piece.numel()
        if missing:
            raise ValueError(
                f"{self.directory}: {missing} of {found.numel()} values of {key} at {list(offset)} are not in the checkpoint; "
                "it belongs to another model, or was damaged: delete it to start from an older one"
            )
        return found

    def _range(self, part: Mapping[str, Any], dtype: torch.dtype, inside: Sequence[tuple[int, int]]) -> torch.Tensor:
        """[low, high) in each dimension of one part: whole rows are read, columns cut out of them."""
        width = dtype.itemsize * math.prod(part["size"][1:])
        first, last = inside[0] if inside else (0, 1)
        stream = self._streams.get(part["file"])
        if stream is None:
            stream = self._streams[part["file"]] = storage.open_input(storage.join(self.directory, part["file"]))
        row = width if inside else dtype.itemsize
        data = stream.read_at((last - first) * row, part["begin"] + first * row)
        values = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)).view(dtype)
        if not inside:
            return values.reshape(())
        block = values.view(last - first, *part["size"][1:])
        return block[(slice(None), *(slice(a, b) for a, b in inside[1:]))]

    def random_states(self, rank: int) -> dict[str, torch.Tensor]:
        """The generator states of one worker of the run that wrote this; empty when it had fewer workers."""
        if rank >= self.workers:
            return {}
        stream = storage.open_input(storage.join(self.directory, f"worker-{rank:05d}.safetensors"))
        length = int.from_bytes(stream.read_at(8, 0), "little")
        header = json.loads(stream.read_at(length, 8))
        found = {}
        for key, entry in header.items():
            if key.startswith("random/"):
                begin, end = entry["data_offsets"]
                data = stream.read_at(end - begin, 8 + length + begin)
                values = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)).view(_BY_NAME[entry["dtype"]])
                found[key.removeprefix("random/")] = values.reshape(entry["shape"])
        return found

    def load(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Fill parameters and optimizer with the parts that this worker holds, however they were cut when written."""
        wanted: dict[str, list[str]] = {}
        for key in self._parts if optimizer is not None else ():
            if key.startswith("optimizer/"):
                _, name, slot = key.split("/", 2)
                wanted.setdefault(name, []).append(slot)
        with torch.no_grad():
            for name, parameter in parameters.items():
                offset, size = box(parameter)
                held(parameter).copy_(self.read(f"weight/{name}", offset, size))
                for slot in wanted.get(name, ()):
                    assert optimizer is not None
                    key = f"optimizer/{name}/{slot}"
                    if not self.shape(key):
                        # The number of steps: kept on the host by optimizers that are not fused.
                        fused = bool(optimizer.defaults.get("fused"))
                        optimizer.state[parameter][slot] = self.read(key).to(held(parameter).device if fused else "cpu")
                        continue
                    value = self.read(key, offset, size).to(held(parameter).device)
                    optimizer.state[parameter][slot] = (
                        DTensor.from_local(
                            value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
                        )
                        if isinstance(parameter, DTensor)
                        else value
                    )

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
