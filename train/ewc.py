"""Elastic weight consolidation: a quadratic penalty on moving away from a model, by what each weight matters to it.

The penalty of Kirkpatrick et al. 2017 (eq. 3) is `strength / 2 * sum_i F_i (theta_i - theta*_i)^2` for each task, where F is
the diagonal of the Fisher information at theta*. Here F has mean 1 over all weights (`train.fisher` divides by the mean), so
that a strength means the same for small and large models: with F = 1 everywhere it is a weight decay towards theta* of that
coefficient.

Several penalties are one: a sum of quadratics is a quadratic around the weighted mean of their anchors, and a constant. So a
weight costs two numbers however many tasks are remembered. The gradient is written down, not differentiated, and added once
an optimizer step. Every worker holds Fisher and anchor for just the part of a weight that it holds itself, read as slices
from the files.

With LoRA the weight is theta_0 + s B A, where theta_0 is the frozen base: with G = dP/dtheta, dP/dB = s G A^T and
dP/dA = s B^T G.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cluster import storage
from train import artifacts, layout, models
from train.parallel import Workers
from train.settings import EwcTerm

FILE, DESCRIPTION = "fisher.safetensors", "fisher.json"

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Diagonal:
    """A Fisher diagonal on file: `fisher.safetensors` (float32, one tensor a weight) and `fisher.json`."""

    directory: Path
    anchor: str  # directory of the model it was taken at
    description: dict[str, Any]

    @classmethod
    def read(cls, path: str) -> Diagonal:
        """Raises FileNotFoundError when there is none, or an unfinished one."""
        if not artifacts.is_complete(path):
            raise FileNotFoundError(
                f"no Fisher diagonal at {path}: a finished `fisher` stage leaves one in its directory's `fisher`"
            )
        directory = artifacts.local_directory(path)
        description = json.loads((directory / DESCRIPTION).read_text("utf-8"))
        return cls(directory, str(description["anchor"]), description)

    def verify(self) -> None:
        """Raises ValueError when the anchor's weights are not those the diagonal was taken at, FileNotFoundError when gone."""
        found = weights_digest(self.anchor)
        if found != self.description["anchor_digest"]:
            raise ValueError(
                f"{self.directory}: its Fisher diagonal was taken at other weights than {self.anchor} holds now (digest "
                f"{self.description['anchor_digest'][:12]}, now {found[:12]}): run the fisher stage again"
            )


def weights_digest(path: str) -> str:
    """sha256 over the weights files of a model directory, by name."""
    digest = hashlib.sha256()
    for file in sorted(models.model_directory(path).glob("*.safetensors")):
        digest.update(f"{file.name}\n".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


class Weights:
    """Slices of the weights of a model directory, by the names that its parameters have.

    Read from the safetensors files; where those use other names than the loaded model (some mixture-of-experts layouts),
    the whole model is loaded to the host's memory instead.
    """

    def __init__(self, path: str, names: Sequence[str]) -> None:
        self._files = ExitStack()
        self._where: dict[str, Any] = {}
        self._loaded: dict[str, torch.Tensor] | None = None
        directory = models.model_directory(path)
        for file in sorted(directory.glob("*.safetensors")):
            handle: Any = self._files.enter_context(safe_open(file, framework="pt"))
            self._where.update(dict.fromkeys(handle.keys(), handle))
        if not set(names) <= set(self._where) or (directory / "adapter_config.json").exists():
            self._loaded = {name: parameter.detach() for name, parameter in models.load(path).named_parameters()}
            absent = sorted(set(names) - set(self._loaded))
            if absent:
                raise ValueError(
                    f"{path} has no weight {absent[0]!r}, which is trained here: EWC holds one model to another of its own"
                )

    def read(self, name: str, part: Slices) -> torch.Tensor:
        """float32, on the CPU."""
        if self._loaded is not None:
            return self._loaded[name][part].float()
        return sliced(self._where[name], name, part)

    def close(self) -> None:
        self._files.close()


def sliced(file: Any, name: str, part: Slices) -> torch.Tensor:
    """A part of a tensor of a safetensors file, float32; the part may be empty."""
    source = file.get_slice(name)
    shape = source.get_shape()
    if not shape:
        return torch.as_tensor(file.get_tensor(name)).float()
    wanted = [piece.stop - piece.start for piece in part] + shape[len(part) :]
    return torch.empty(wanted) if 0 in wanted else torch.as_tensor(source[part]).float()


@contextmanager
def opened(path: str, names: Sequence[str]) -> Iterator[Weights]:
    weights = Weights(path, names)
    try:
        yield weights
    finally:
        weights.close()


def held(parameter: torch.Tensor) -> Slices:
    """Which part of a weight this worker holds: all of it, or its shard under FSDP2 and tensor parallelism."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


@dataclass
class _Quadratic:
    """strength/2 F (theta - theta*)^2 summed over tasks, for the part of one weight that this worker holds."""

    curvature: torch.Tensor  # sum of strength x F
    centre: torch.Tensor  # mean of the anchors, weighted by that
    constant: float  # of this worker's part
    share: float  # 1 / number of workers that hold this very part


@dataclass(frozen=True)
class _Adapter:
    """The parameters of one LoRA module."""

    weight: str  # name of the frozen weight in the base
    a: str
    b: str
    scale: float


class Ewc:
    """The penalties of `terms` on a model, as one. A `finetune.Penalty`.

    `base` is the directory the model was loaded from; `model` the model that is trained, a PeftModel among them. Nothing is
    read before the first call, when weights lie where they are to stay. Raises ValueError for an anchor that has changed, for
    adapters whose merged weight is no sum (DoRA), and for trained parameters that the Fisher stage has not seen.
    """

    def __init__(self, terms: Sequence[EwcTerm], base: str, model: torch.nn.Module, workers: Workers) -> None:
        self.workers, self.base, self.terms = workers, base, list(terms)
        self.diagonals = workers.together(lambda: [Diagonal.read(term.fisher) for term in terms])

        def verify() -> None:
            for diagonal in self.diagonals:
                diagonal.verify()

        workers.on_first(verify)
        self._adapters = _adapters(model)
        self._parts: dict[str, _Quadratic] | None = None

    def __call__(self, parameters: Mapping[str, torch.nn.Parameter]) -> torch.Tensor:
        """Add the penalty's gradient to `grad` of the trained parameters; return its value over all workers, a scalar."""
        if self._parts is None:
            self._parts = self.workers.together(lambda: self._read(parameters))
        total = torch.zeros((), dtype=torch.float64, device=self.workers.device)
        with torch.no_grad():
            if self._adapters:
                for adapter in self._adapters:
                    total += self._on_adapter(adapter, parameters)
            else:
                for name, parameter in parameters.items():
                    quadratic = self._parts[name]
                    moved = layout.held(parameter).detach().float() - quadratic.centre
                    gradient = quadratic.curvature * moved
                    total += _value(quadratic, gradient, moved)
                    _add(parameter, gradient)
        return self.workers.sum(total)

    def _on_adapter(self, adapter: _Adapter, parameters: Mapping[str, torch.nn.Parameter]) -> torch.Tensor:
        assert self._parts is not None
        quadratic = self._parts[adapter.weight]
        a, b = parameters[adapter.a], parameters[adapter.b]
        rows = layout.held(b).detach().float()  # of the merged weight, those that this worker holds
        across = (a.full_tensor() if isinstance(a, DTensor) else a).detach().float()
        moved = adapter.scale * (rows @ across) - quadratic.centre
        gradient = quadratic.curvature * moved
        _add(b, adapter.scale * (gradient @ across.T))
        towards = adapter.scale * (rows.T @ gradient)
        if isinstance(b, DTensor):
            dist.all_reduce(towards, group=b.device_mesh.get_group())
        _add(a, towards[held(a)] if isinstance(a, DTensor) else towards)
        return _value(quadratic, gradient, moved)

    def _read(self, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, _Quadratic]:
        """Fisher and anchor of every trained weight. For adapters `centre` is relative to the frozen base."""
        if self._adapters:
            of_adapters = {name for adapter in self._adapters for name in (adapter.a, adapter.b)}
            strange = sorted(set(parameters) - of_adapters)
            if strange:
                raise ValueError(
                    f"ewc: {strange[0]!r} is trained, which is no LoRA matrix of a linear layer; choose other lora.targets"
                )
            wanted = {adapter.weight: parameters[adapter.b] for adapter in self._adapters}
            across = {adapter.weight: parameters[adapter.a].shape[1] for adapter in self._adapters}
            outputs = {name: len(layout.held(parameter)) for name, parameter in wanted.items()}
            shapes: dict[str, tuple[int, ...]] = {name: (outputs[name], across[name]) for name in wanted}
        else:
            wanted = dict(parameters)
            shapes = {name: tuple(layout.held(parameter).shape) for name, parameter in wanted.items()}
        names = list(wanted)
        device = self.workers.device
        parts: dict[str, _Quadratic] = {}
        with ExitStack() as stack:
            fishers = [stack.enter_context(safe_open(item.directory / FILE, framework="pt")) for item in self.diagonals]
            for name in names:
                for diagonal, fisher in zip(self.diagonals, fishers, strict=True):
                    if name not in fisher.keys():  # noqa: SIM118  the handle is no mapping
                        raise ValueError(f"ewc: {name!r} is trained, but {diagonal.directory / FILE} has no such weight")
            anchors = [stack.enter_context(opened(item.anchor, names)) for item in self.diagonals]
            base = None
            if self._adapters and any(item.anchor != self.base for item in self.diagonals):
                base = stack.enter_context(opened(self.base, names))
            for name, parameter in wanted.items():
                # Rows of the merged weight lie where rows of B lie; A spans all columns.
                rows = held(parameter)[:1]
                part = rows if self._adapters else held(parameter)
                if self._adapters and isinstance(parameter, DTensor) and parameter.device_mesh.ndim > 1:
                    raise ValueError("ewc with LoRA needs a one-dimensional device mesh")
                curvatures, centres = [], []
                for term, item, fisher, anchor in zip(self.terms, self.diagonals, fishers, anchors, strict=True):
                    curvatures.append(term.strength * sliced(fisher, name, part))
                    if not self._adapters:
                        centres.append(anchor.read(name, part))
                    elif base is None or item.anchor == self.base:
                        centres.append(torch.zeros_like(curvatures[-1]))
                    else:
                        centres.append(anchor.read(name, part) - base.read(name, part))
                    found = {tuple(curvatures[-1].shape), tuple(centres[-1].shape), shapes[name]}
                    if len(found) > 1:
                        raise ValueError(
                            f"ewc: {name!r} is trained with shape {shapes[name]}, but not in {item.directory}: {sorted(found)}"
                        )
                parts[name] = _combined(curvatures, centres, _share(parameter, self.workers.world), device)
        return parts


def _combined(curvatures: list[torch.Tensor], centres: list[torch.Tensor], share: float, device: torch.device) -> _Quadratic:
    """sum_k c_k/2 (x - m_k)^2 = c/2 (x - m)^2 + constant, with c = sum c_k, m = sum c_k m_k / c."""
    if len(curvatures) == 1:
        return _Quadratic(curvatures[0].to(device), centres[0].to(device), 0.0, share)
    curvature = torch.stack(curvatures).sum(dim=0)
    weighted = sum((c * m for c, m in zip(curvatures, centres, strict=True)), torch.zeros_like(curvature))
    centre = torch.where(curvature > 0, weighted / curvature.clamp_min(torch.finfo(torch.float32).tiny), centres[0])
    constant = sum(
        float((c * (m - centre).square()).sum(dtype=torch.float64)) / 2 for c, m in zip(curvatures, centres, strict=True)
    )
    return _Quadratic(curvature.to(device), centre.to(device), constant, share)


def _value(quadratic: _Quadratic, gradient: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    return ((gradient * moved).sum(dtype=torch.float64) / 2 + quadratic.constant) * quadratic.share


def _add(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    given: Any = parameter.grad
    if isinstance(parameter, DTensor) and given.placements != parameter.placements:
        parameter.grad = given = given.redistribute(placements=parameter.placements)
    layout.held(given).add_(gradient.to(parameter.dtype))


def _share(parameter: torch.Tensor, world: int) -> float:
    """1 / the number of workers that hold the same part of a weight."""
    parts = 1
    if isinstance(parameter, DTensor):
        for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
            if not isinstance(placement, Replicate):
                parts *= size
    return parts / world


def _adapters(model: torch.nn.Module) -> list[_Adapter]:
    """The LoRA modules of a PeftModel, none of another model. Raises ValueError for adapters that are no low-rank sum."""
    found = []
    for prefix, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        names = list(module.lora_A)
        if len(names) != 1 or getattr(module, "fan_in_fan_out", False) or len(getattr(module, "lora_embedding_A", {})):
            raise ValueError(f"ewc: {prefix} is no linear layer with one LoRA adapter; choose other lora.targets")
        if getattr(module, "use_dora", {}).get(names[0], False) or len(getattr(module, "lora_magnitude_vector", {})):
            raise ValueError("ewc does not work with lora.dora: a merged DoRA weight is no sum of base and product")
        weight = prefix.removeprefix("base_model.model.") + ".weight"
        found.append(
            _Adapter(
                weight, f"{prefix}.lora_A.{names[0]}.weight", f"{prefix}.lora_B.{names[0]}.weight", float(module.scaling[names[0]])
            )
        )
    return found


def write(path: str, diagonal: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    """Put a Fisher diagonal on file."""
    from safetensors.torch import save_file

    with artifacts.building(path) as directory:
        save_file({name: value.contiguous() for name, value in diagonal.items()}, directory / FILE)
        (directory / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True), "utf-8")


def fisher_path(directory: str) -> str:
    """Where a fisher stage leaves its diagonal; a path that is a diagonal itself stays as it is."""
    return directory if storage.exists(storage.join(directory, FILE)) else storage.join(directory, "fisher")
