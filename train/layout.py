"""How one model lies over the workers of a pretraining job: a mesh of (data, tensor), and the model cut along it.

- data: each group of workers takes other samples. `ddp` keeps the whole model on each; `fsdp2` cuts weights, gradients and
  the optimizer's state among them (Zhao et al. 2023, "PyTorch FSDP"; torch's `fully_shard`), block by block.
- tensor: workers take the same samples and share each product (Shoeybi et al. 2019, "Megatron-LM", section 3): attention
  heads, the MLP's width and the vocabulary are cut; one sum over the workers follows each attention and each MLP.

Both together are a two-dimensional mesh; neighbouring ranks share products, so that they lie within one machine.
A model that is cut never lies whole on a worker, except on the first one's host memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.attention.varlen  # registers an operator named below
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from train import attention as attention  # registers an operator named below
from train.parallel import Workers
from train.settings import PretrainSettings

TENSOR_PARALLEL = ("llama", "qwen3")
"""Model types whose products can be shared."""

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.danlu.attend_slices.default,
    torch.ops._c10d_functional.all_reduce.default,
}


@dataclass(frozen=True)
class Layout:
    """The mesh of a job, and this worker's place on it."""

    workers: Workers
    sharding: str  # none, ddp or fsdp2, as it is in force
    data: int  # groups of workers with samples of their own
    tensor: int  # workers that share each product
    mesh: DeviceMesh | None = None  # (data, tensor), where anything is cut

    @property
    def data_rank(self) -> int:
        """Which share of a batch this worker takes."""
        return self.workers.rank // self.tensor

    @property
    def cut(self) -> bool:
        """True when no worker holds all weights."""
        return self.mesh is not None

    def __str__(self) -> str:
        words = [] if self.data == 1 else [f"{self.sharding} {self.data}"]
        words += [] if self.tensor == 1 else [f"tensor {self.tensor}"]
        return " x ".join(words) or "one worker"


def possible(settings: PretrainSettings, world: int, config: Any | None) -> list[str]:
    """The layouts that would do for this many workers and, where its configuration is known, this model."""
    found = []
    for tensor in range(1, world + 1):
        if world % tensor or settings.batch_sequences % (world // tensor) or _unfit(tensor, config):
            continue
        data = world // tensor
        kinds = ["none"] if data == 1 else ["fsdp2"] if tensor > 1 else ["ddp", "fsdp2"]
        found += [f"{{sharding: {kind}, tensor: {tensor}}}" for kind in kinds]
    return found


def _unfit(tensor: int, config: Any | None) -> str | None:
    """Why a model's products cannot be shared by so many workers."""
    if tensor == 1 or config is None:
        return None
    if config.model_type not in TENSOR_PARALLEL:
        return f"a model of type {config.model_type} has no tensor-parallel plan (there are plans for {', '.join(TENSOR_PARALLEL)})"
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, name)
        if size % tensor:
            return f"{tensor} does not divide the model's {name} ({size})"
    return None


def choose(settings: PretrainSettings, workers: Workers, config: Any | None = None) -> Layout:
    """The layout that settings ask for, without a mesh: nothing is set up yet.

    Raises ValueError for an impossible one, naming those that are possible.
    """
    wanted, world = settings.parallel, workers.world
    data = world // wanted.tensor
    reason = None
    if world % wanted.tensor:
        reason = f"tensor {wanted.tensor} does not divide {world} workers"
    elif unfit := _unfit(wanted.tensor, config):
        reason = unfit
    elif wanted.sharding == "none" and data > 1:
        reason = f"sharding none insists on one group of workers, and there are {data}"
    elif wanted.sharding == "ddp" and data > 1 and wanted.tensor > 1:
        reason = f"with tensor {wanted.tensor} the {data} groups of workers need sharding fsdp2"
    elif settings.batch_sequences % data:
        reason = f"a global batch of {settings.batch_sequences} sequences does not divide among {data} groups of workers"
    if reason is not None:
        names = possible(settings, world, config)
        valid = ", ".join(names) if names else f"none with batch_sequences {settings.batch_sequences}; change that"
        raise ValueError(f"parallel: {reason}. Possible with {world} worker{'s' * (world > 1)}: {valid}")
    return Layout(workers, "none" if data == 1 else wanted.sharding, data, wanted.tensor)


def set_up(layout: Layout) -> Layout:
    """The layout with its process groups. All workers take part."""
    if layout.sharding != "fsdp2" and layout.tensor == 1:
        return layout
    mesh = init_device_mesh(layout.workers.device.type, (layout.data, layout.tensor), mesh_dim_names=("data", "tensor"))
    return Layout(layout.workers, layout.sharding, layout.data, layout.tensor, mesh)


def skeleton(config: Any) -> PreTrainedModel:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation, dtype=torch.float32)


def cut(objective: nn.Module, layout: Layout, precision: str) -> None:
    """Cut a loss module without memory (`network` on the meta device) along the mesh, then give it memory, unfilled.

    Raises ValueError unless what this worker holds then is its share.
    """
    assert layout.mesh is not None
    network: Any = objective.network
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    if layout.tensor > 1:
        tensor = layout.mesh["tensor"]
        _share_products(network, tensor)
        objective.tensor_mesh = tensor  # type: ignore[assignment]
    if layout.sharding == "fsdp2":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        data = layout.mesh["data"]
        for block in blocks(network):
            fully_shard(block, mesh=data, mp_policy=policy)
        fully_shard(objective, mesh=data, mp_policy=policy)
    objective.to_empty(device=layout.workers.device)
    verify(network, sizes, layout)


def verify(network: nn.Module, sizes: Mapping[str, int], layout: Layout) -> None:
    """Count what this worker holds. Raises ValueError unless that is its share: a flag that did nothing must not go unseen."""
    held = whole = least = 0
    for name, parameter in network.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        matrix = parameter.ndim >= 2
        parts = (layout.data if layout.sharding == "fsdp2" else 1) * (layout.tensor if matrix else 1)
        rows = max(1, parameter.shape[0])
        held, whole = held + local.numel(), whole + sizes[name]
        least += math.ceil(rows / parts) * (sizes[name] // rows) + sizes[name] // rows  # a row over where rows do not divide
    if held > least:
        raise ValueError(
            f"parallel: this worker holds {held} of {whole} parameters, not its share of the layout {layout}: something that "
            "was asked for was not done"
        )


def blocks(network: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks. Raises ValueError when the model does not name them."""
    names = set(network._no_split_modules or ())
    found = [module for module in network.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(f"{type(network).__name__} does not name its blocks (_no_split_modules): it cannot be sharded by them")
    return found


def _share_products(network: Any, mesh: DeviceMesh) -> None:
    styles: dict[str, ParallelStyle] = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    if network.config.model_type == "qwen3":
        # [rows, length, heads, width]: each worker norms its own heads, so the gradient of the norm is a sum over workers.
        styles |= {f"self_attn.{name}": SequenceParallel(sequence_dim=2, use_local_output=True) for name in ("q_norm", "k_norm")}
    for block in blocks(network):
        parallelize_module(block, mesh, styles)
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    tied = head.weight is embedding.weight
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()))
    if tied:
        embedding.weight = head.weight
    else:
        # RowwiseParallel cuts an embedding by vocabulary; its forward is replaced below.
        parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()))
        embedding._forward_pre_hooks.clear()
        embedding._forward_hooks.clear()
    embedding.forward = MethodType(_look_up, embedding)


class _Sum(torch.autograd.Function):
    """The sum over workers, each of whom goes on with all of it and so has all of the gradient."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:  # type: ignore[override]
        values = values.clone()
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


def _look_up(embedding: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """The embedding of tokens where each worker holds a part of the vocabulary (Megatron-LM's).

    Not DTensor's own (RowwiseParallel): that makes the gradient of the whole vocabulary on each worker.
    """
    weight: Any = embedding.weight
    mesh = weight.device_mesh
    first = mesh.get_local_rank() * -(-weight.shape[0] // mesh.size())
    part = weight.to_local()
    own = ids - first
    here = (own >= 0) & (own < len(part))
    padding = None if embedding.padding_idx is None else embedding.padding_idx - first
    if padding is not None and not 0 <= padding < len(part):
        padding = None
    found = F.embedding(own.clamp(0, len(part) - 1), part, padding) * here[..., None]
    return _Sum.apply(found, mesh.get_group())  # type: ignore[no-any-return,no-untyped-call]


def box(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offset, size) of the part of a tensor that this worker holds."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    size, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(size)


def held(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this worker holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Cut a model under FSDP2 again after forward passes that no backward pass followed, which leave its root whole: what then
    looks at the parameters must find what this worker holds. Any other model is as it was."""
    if isinstance(model, FSDPModule):
        model.reshard()


def fill(network: nn.Module, source: nn.Module | None, layout: Layout) -> None:
    """Give a cut network the first worker's values, matrix by matrix; `source` is the whole model there, None elsewhere.

    Buffers, and tensors that modules keep as plain attributes, are filled too: they depend on the configuration alone.
    """
    workers = layout.workers

    def sent(template: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
        whole = torch.empty(template.shape, dtype=template.dtype, device=workers.device)
        if value is not None:
            whole.copy_(value)
        dist.broadcast(whole, src=0)
        return whole

    parameters = dict(source.named_parameters()) if source is not None else {}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            whole = sent(parameter, parameters.get(name))
            offset, size = box(parameter)
            part = whole[tuple(slice(start, start + count) for start, count in zip(offset, size, strict=True))]
            held(parameter).copy_(part)


def fill_buffers(network: nn.Module, source: nn.Module | None, layout: Layout) -> None:
    """Give a cut network what is no weight: buffers, and tensors kept as plain attributes, from the first worker's model."""
    workers = layout.workers
    modules = dict(source.named_modules()) if source is not None else {}

    def values(name: str) -> dict[str, torch.Tensor]:
        module = modules[name]
        plain = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
        return {**plain, **dict(module.named_buffers(recurse=False))}

    for name, module in network.named_modules():
        wanted = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
        buffers = dict(module.named_buffers(recurse=False))
        for key, template in {**wanted, **buffers}.items():
            whole = torch.empty(template.shape, dtype=template.dtype, device=workers.device)
            if source is not None:
                whole.copy_(values(name)[key])
            dist.broadcast(whole, src=0)
            if key in buffers:
                module._buffers[key] = whole
            else:
                setattr(module, key, whole)


def whole(network: nn.Module, layout: Layout) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(name, all of a weight on the first worker's host, None elsewhere), weight after weight. All workers take part."""
    for name, parameter in network.named_parameters():
        value = parameter.detach()
        full = value.full_tensor() if isinstance(value, DTensor) else value
        yield name, full.cpu() if layout.workers.first else None


def gathered(network: PreTrainedModel, layout: Layout) -> PreTrainedModel | None:
    """The network as an ordinary model on the first worker's host, None elsewhere; itself where nothing is cut."""
    if not layout.cut:
        return network if layout.workers.first else None
    weights = {name: value for name, value in whole(network, layout) if value is not None}
    if not layout.workers.first:
        return None
    model = skeleton(network.config)
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise RuntimeError(f"weights were lost when the model was put together: {', '.join(missing[:5])}")
    model.generation_config = network.generation_config
    return model


def checkpoint_activations(network: PreTrainedModel, mode: str) -> None:
    """Keep less for the backward pass: `full` keeps the input of each block and computes the rest again, `selective` also
    the results of attention, of sums over workers and of every other matrix product (as torchtitan does).

    Chen et al. 2016, "Training deep nets with sublinear memory cost". Raises ValueError for a model that has no support.
    """
    if mode == "none":
        return
    if not network.supports_gradient_checkpointing:
        raise ValueError(f"{type(network).__name__} does not support activation_checkpointing; use none")
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        arguments["context_fn"] = _selective
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def _selective() -> tuple[Any, Any]:
    products = {False: 0, True: 0}

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operator == torch.ops.aten.mm.default:
            products[context.is_recompute] += 1
            return CheckpointPolicy.MUST_SAVE if products[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(policy)
    return contexts


def check_compiler(device: torch.device) -> None:
    """Raises ValueError when torch.compile has nothing to compile with on this machine."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ValueError(
            f"compile: torch.compile needs a C++ compiler (g++) on CPU workers: {error}; install it or use false"
        ) from None


def compile_blocks(network: PreTrainedModel) -> None:
    """Compile each block in place: blocks are alike, so the first one's code serves all."""
    # Under DDP the compiler would cut graphs where gradients are summed, to overlap both; a block is such a cut already, and the
    # cutter does not know selective checkpointing.
    torch._dynamo.config.optimize_ddp = False
    for block in blocks(network):
        block.compile()


def wrapped(objective: nn.Module, layout: Layout) -> nn.Module:
    """What the loop calls: the loss module, under DDP where that is the layout."""
    if layout.sharding != "ddp":
        return objective
    device = layout.workers.device
    return DistributedDataParallel(
        objective,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # they depend on the configuration alone
    )


def accumulating(network: nn.Module) -> AbstractContextManager[Any]:
    """Around the backward passes of all micro batches but the last.

    DDP sums gradients over workers just once then. FSDP2 does so each time: only its own share of a sum stays in memory.
    """
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


@contextmanager
def autocast(layout: Layout, precision: str) -> Iterator[None]:
    """bf16 products where weights are not cast by FSDP2 already."""
    enabled = precision == "bf16" and layout.sharding != "fsdp2"
    with torch.autocast(layout.workers.device.type, torch.bfloat16, enabled=enabled):
        yield


def settle_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Give every gradient the placement of its weight: a pending sum over workers is made."""
    for parameter in parameters.values():
        gradient = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def global_norm(parameters: Mapping[str, nn.Parameter], layout: Layout) -> torch.Tensor:
    """The Euclidean norm of all gradients, float64: of each part once, whoever holds it, in whatever mesh."""
    device = layout.workers.device
    parts: dict[float, list[torch.Tensor]] = {}
    for parameter in parameters.values():
        if parameter.grad is not None:
            parts.setdefault(_copies(parameter, layout), []).append(held(parameter.grad))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for copies, gradients in parts.items():
        total += torch.stack(torch._foreach_norm(gradients)).double().square().sum() / copies
    return (layout.workers.sum(total) if layout.cut else total).sqrt()


def _copies(parameter: torch.Tensor, layout: Layout) -> float:
    """How many workers hold the same part of a weight; 1 where nothing is summed over workers."""
    if not layout.cut:
        return 1.0
    parts = 1
    if isinstance(parameter, DTensor):
        for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
            parts *= 1 if isinstance(placement, Replicate) else size
    return layout.workers.world / parts


def scale_gradients(parameters: Mapping[str, nn.Parameter], factor: torch.Tensor) -> None:
    """Multiply all gradients by a scalar."""
    gradients = [held(parameter.grad) for parameter in parameters.values() if parameter.grad is not None]
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for an optimizer: matrices with weight decay, vectors without; those of one mesh together."""
    groups: dict[tuple[bool, str], list[nn.Parameter]] = {}
    for parameter in parameters.values():
        mesh = repr(parameter.device_mesh) if isinstance(parameter, DTensor) else ""
        groups.setdefault((parameter.ndim >= 2, mesh), []).append(parameter)
    return [{"params": members, "weight_decay": weight_decay if matrix else 0.0} for (matrix, _), members in groups.items()]


Penalty = Callable[[Mapping[str, nn.Parameter]], torch.Tensor]
"""A term of the loss that depends on the weights alone (as in train.finetune): adds to `grad`, returns its value."""
