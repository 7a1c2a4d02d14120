"""Fully sharded training of a model that a library's trainer holds: cut it, prove that it was cut, put it together again.

Accelerate's FSDP2 plugin takes no notice of CPU workers (its state turns to FSDP for GPUs only, so `fsdp=True` silently
stays DDP), and a head in a group of its own would be read as a sharded tensor by TRL's fused loss, whose gradient is then
never summed over workers. So the model is cut here by `fully_shard` (Zhao et al. 2023, "PyTorch FSDP"): each block is a group,
embedding, last norm and head stay in the root's group and are whole while the model's forward runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from train.layout import held, reshard
from train.parallel import Workers


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def shard(model: Any, workers: Workers) -> None:
    """Cut weights, gradients and the optimizer that is made afterwards among all workers, in place.

    Raises ValueError when the model's blocks are not known, or when a worker still holds more than its share.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"sharding: fsdp2 needs to know the blocks of a model, and {type(base).__name__} does not name any; use sharding: ddp"
        )
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    mesh = init_device_mesh(workers.device.type, (workers.world,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    @contextmanager
    def no_sync() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    model.no_sync = no_sync  # what Accelerate looks for while gradients are accumulated
    verify(model, whole, workers.world)


def verify(model: torch.nn.Module, whole: Mapping[str, int], world: int) -> None:
    """Count what this worker holds. Raises ValueError unless that is its share, give or take a row of each parameter."""
    share = sum(held(parameter).numel() for parameter in model.parameters())
    spare = sum(parameter.numel() // max(1, parameter.shape[0]) for parameter in model.parameters() if parameter.ndim)
    if share > sum(whole.values()) / world + spare:
        raise ValueError(
            f"sharding: fsdp2 was asked for, but this worker holds {share} of {sum(whole.values())} parameters, not a share of "
            f"1/{world}: nothing was sharded"
        )


def gather(model: torch.nn.Module, keep: bool) -> None:
    """Make a sharded model an ordinary one, whole on the CPU where `keep` is True and empty elsewhere. All workers take part."""
    reshard(model)
    whole: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in whole:  # a tied matrix is gathered once and stays tied
                full = parameter.detach().full_tensor()
                value = full.cpu() if keep else torch.empty(0)
                whole[id(parameter)] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[name] = whole[id(parameter)]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__bases__[1]  # `fully_shard` put a class of its own in front
