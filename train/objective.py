"""The loss of packed rows: cross entropy over a chunked head, z-loss, and the balancing loss of experts.

`PackedLoss` holds the network and is what a training loop wraps (DDP, FSDP2, tensor parallel, compile). It returns sums
over tokens, so that a loop divides by the number of tokens of the whole global batch.

Logits of all tokens are never alive at once: the head goes through tokens in chunks, computes a chunk's loss and, in the
same pass, its gradients (as Liger Kernel does, Hsu et al. 2024, arXiv 2410.10989, section 3.3), so nothing is computed
twice in the backward pass and no softmax is kept for it. Positions without a label do not reach the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.modeling_utils import PreTrainedModel

from train import attention
from train.attention import Documents, Form
from train.loader import IGNORE, Batch

_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
"""Logits of one chunk. The larger a chunk, the less it costs to add up the head's gradient, which is done once a chunk."""

_SOFTMAX_ROWS = {"cpu": 16}
"""Tokens whose softmax is computed at a time. On CPU as many as stay in the cache between its passes; a GPU takes a chunk."""


_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Configuration keys of models that do more to their logits than one product."""


class PackedLoss(nn.Module):
    """A causal language model with the loss of packed rows.

    `z_loss` is the factor of the squared log of the softmax's normaliser (PaLM, section 5); `balance_loss` that of the
    balancing loss of experts (default: the configuration's `router_aux_loss_coef`; none for a dense model). Under tensor
    parallelism the head's weight may be cut by vocabulary: set `tensor_mesh` to the mesh it is cut over.

    Raises ValueError for a model whose attention or head computes something else.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        z_loss: float = 0.0,
        balance_loss: float | None = None,
        chunk_tokens: int | None = None,
        form: Form | None = None,
    ) -> None:
        super().__init__()
        attention.use(network)
        head = network.get_output_embeddings()
        config = network.config.get_text_config()
        scaled = [
            key
            for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")
            if getattr(config, key, None) not in (None, 1.0)
        ]
        if scaled or not isinstance(head, nn.Linear) or head.bias is not None:
            what = f"scales its logits ({', '.join(scaled)})" if scaled else "has a head that is not one matrix"
            raise ValueError(f"{type(network).__name__} {what}: its loss cannot be computed in chunks")
        self.network: PreTrainedModel = network
        self.z_loss: float = z_loss
        self.chunk_tokens: int | None = chunk_tokens
        self.form: Form | None = form
        self.experts_per_token: int = int(getattr(config, "num_experts_per_tok", None) or 0)
        configured = float(getattr(config, "router_aux_loss_coef", None) or 0.0)
        self.balance_loss: float = configured if balance_loss is None else balance_loss
        self.tensor_mesh: DeviceMesh | None = None

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor | None = None,
        documents: Documents | None = None,
        valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The summed loss of some packed rows, a float32 scalar, and its detached parts.

        All inputs [rows, length]; `labels` hold the token after each position, -100 where there is none; `weights`
        multiply the loss of single positions. `documents` and `valid` (flat positions with a label) are found from the
        others where not given; on a GPU that waits for the device, so let `prepare` make them.

        Parts: `cross_entropy` (sum), `z_loss` and `balance_loss` (as they are contained in the loss) where in use,
        `expert_tokens` [layers with experts, experts], the number of tokens with loss sent to each expert.
        """
        if documents is None:
            documents = Documents.of(position_ids, self.form, self.compute_dtype(position_ids.device))
        if valid is None:
            valid = torch.nonzero(labels.reshape(-1) != IGNORE).flatten()
        outputs = self._body(input_ids, position_ids, documents)
        hidden = outputs.last_hidden_state
        if isinstance(hidden, DTensor):
            hidden = hidden.full_tensor()
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, valid)
        targets = labels.reshape(-1).index_select(0, valid)
        token_weights = None if weights is None else weights.reshape(-1).index_select(0, valid).float()
        loss, cross_entropy, z_loss = self._head(chosen, targets, token_weights)
        parts = {"cross_entropy": cross_entropy.detach()}
        if self.z_loss:
            parts["z_loss"] = z_loss.detach()
        routers = getattr(outputs, "router_logits", None)
        if routers:
            mask = (labels != IGNORE).float()
            balance, counts = balancing_loss(
                tuple(routers), mask, mask if weights is None else mask * weights, self.experts_per_token
            )
            parts["expert_tokens"] = counts
            if self.balance_loss:
                balance = balance * self.balance_loss
                parts["balance_loss"] = balance.detach()
                loss = loss + balance
        return loss, parts

    def logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """Logits [rows, length, vocab] of packed rows, documents isolated from each other: for tests and evaluation."""
        if documents is None:
            documents = Documents.of(position_ids, self.form, self.compute_dtype(position_ids.device))
        return self.network.get_output_embeddings()(self._body(input_ids, position_ids, documents).last_hidden_state)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """What products are computed in at this moment: autocast's type, else the weights'."""
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.network.dtype

    def _body(self, input_ids: torch.Tensor, position_ids: torch.Tensor, documents: Documents) -> Any:
        more = {"output_router_logits": True} if self.experts_per_token else {}
        return self.network.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False, documents=documents, **more
        )

    @torch.compiler.disable
    def _head(
        self, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = self.network.get_output_embeddings().weight
        group, first = None, 0
        if isinstance(weight, DTensor):
            if self.tensor_mesh is None or weight.device_mesh != self.tensor_mesh or weight.device_mesh.ndim != 1:
                raise RuntimeError(
                    "the head's weight is cut among workers, but not by tensor parallelism: shard the PackedLoss as a whole "
                    "(fully_shard on it), not its head alone, and set tensor_mesh under tensor parallelism"
                )
            placement = weight.placements[0]
            if isinstance(placement, Shard) and placement.dim == 0:
                group = weight.device_mesh.get_group()
                rank, world = weight.device_mesh.get_local_rank(), weight.device_mesh.size()
                first = rank * -(-weight.shape[0] // world)
            elif not isinstance(placement, Replicate):
                raise RuntimeError(f"the head's weight lies as {placement}; it must be whole or cut by vocabulary")
            weight = weight.to_local()
        dtype = self.compute_dtype(hidden.device)
        budget = _CHUNK_BYTES.get(hidden.device.type, 1 << 28)
        chunk = self.chunk_tokens or max(64, budget // (dtype.itemsize * weight.shape[0]) // 64 * 64)
        return head_loss(hidden, weight, targets, weights, self.z_loss, chunk, dtype, group, first)


def prepare(
    batch: Batch, rows: slice, device: torch.device, dtype: torch.dtype, form: Form | None = None
) -> dict[str, torch.Tensor | Documents]:
    """The arguments of `PackedLoss.forward` for some rows of a batch: all that is found on the host, moved to `device`.

    Call it a step ahead (in a thread, if you like): on a GPU nothing of it waits. `dtype` is what attention computes in.
    """
    ids, positions, labels = (torch.from_numpy(array[rows]) for array in (batch.input_ids, batch.position_ids, batch.labels))
    valid = torch.nonzero(labels.reshape(-1) != IGNORE).flatten()

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)).long()

    return {
        "input_ids": moved(ids),
        "position_ids": moved(positions),
        "labels": moved(labels),
        "valid": moved(valid),
        "documents": Documents.on(positions, device, form, dtype),
    }


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    z_loss: float,
    chunk: int,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None = None,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, cross entropy, z-loss), each a float32 sum over tokens; only the first has a gradient.

    `hidden` [tokens, width], `weight` [vocab, width], `targets` [tokens], `weights` [tokens] or None. Products are
    computed in `dtype`, the softmax in float32. With `group`, `weight` is this worker's part of the vocabulary,
    beginning at token `first` (Megatron-LM's vocabulary-parallel loss, arXiv 1909.08053, section 3).
    """
    return _HeadLoss.apply(hidden, weight, targets, weights, z_loss, chunk, dtype, group, first, torch.is_grad_enabled())  # type: ignore[no-untyped-call]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        z_loss: float,
        chunk: int,
        dtype: torch.dtype,
        group: dist.ProcessGroup | None,
        first: int,
        training: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, vocab = len(hidden), len(weight)
        device = hidden.device
        states, matrix = hidden.detach().to(dtype), weight.detach().to(dtype)
        wants_hidden, wants_weight = (training and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(states) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=device) if wants_weight else None
        cross_entropy = torch.zeros((), dtype=torch.float64, device=device)
        squares = torch.zeros((), dtype=torch.float64, device=device)
        # one set of buffers for all chunks: fresh memory of this size costs as much as computing on it
        products = torch.empty(min(chunk, tokens), vocab, dtype=dtype, device=device)
        height = chunk if group is not None else min(chunk, _SOFTMAX_ROWS.get(device.type, chunk))
        buffers = [torch.empty(min(height, tokens), vocab, dtype=torch.float32, device=device) for _ in range(2)]
        with torch.autocast(device.type, enabled=False):
            for start in range(0, tokens, chunk):
                part = slice(start, min(start + chunk, tokens))
                logits = torch.mm(states[part], matrix.t(), out=products[: part.stop - part.start])
                for top in range(0, len(logits), height):
                    block = logits[top : top + height]
                    here = slice(start + top, start + top + len(block))
                    scale = None if weights is None else weights[here]
                    target = targets[here, None] - first
                    probability, picked, normaliser = _softmax(block, target, buffers, group)
                    each, square = (normaliser - picked).double(), normaliser.double().square()
                    cross_entropy += (each if scale is None else each * scale).sum()
                    squares += (square if scale is None else square * scale).sum()
                    if not (wants_hidden or wants_weight):
                        continue
                    if z_loss:
                        probability *= (1 + 2 * z_loss * normaliser)[:, None]
                    if group is None:
                        probability.scatter_add_(1, target, probability.new_full((), -1.0).expand_as(target))
                    else:
                        mine = (target >= 0) & (target < vocab)
                        probability.scatter_add_(1, target.clamp(0, vocab - 1), torch.where(mine, -1.0, 0.0))
                    if scale is not None:
                        probability *= scale[:, None]
                    block.copy_(probability)
                if grad_hidden is not None:
                    torch.mm(logits, matrix, out=grad_hidden[part])
                if grad_weight is not None and dtype == torch.float32:
                    grad_weight.addmm_(logits.t(), states[part])
                elif grad_weight is not None:
                    grad_weight += logits.t() @ states[part]
        if grad_hidden is not None and group is not None:
            dist.all_reduce(grad_hidden, group=group)
        ctx.gradients = (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
        )
        total = cross_entropy + z_loss * squares
        ctx.mark_non_differentiable(cross_entropy_sum := cross_entropy.float(), squares_sum := (z_loss * squares).float())
        return total.float(), cross_entropy_sum, squares_sum

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("the loss was differentiated twice; its gradients are computed once, in the forward pass")
        found, ctx.gradients = ctx.gradients, None
        return *(None if part is None else part.mul_(grad) for part in found), *[None] * 8


def _softmax(
    logits: torch.Tensor, target: torch.Tensor, buffers: list[torch.Tensor], group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(softmax [tokens, vocab], the target's logit [tokens], the log of the normaliser [tokens]), all float32.

    The softmax lies in the second buffer. With a group each worker has its part of the vocabulary.
    """
    count, vocab = logits.shape
    source, found = (buffer[:count] for buffer in buffers)
    if group is None:
        source = logits if logits.dtype == torch.float32 else source.copy_(logits)
        # torch's kernel goes over a row twice while it is in the cache
        torch.ops.aten._log_softmax.out(source, 1, False, out=found)
        picked = source.gather(1, target)[:, 0]
        normaliser = picked - found.gather(1, target)[:, 0]
        return found.exp_(), picked, normaliser
    found.copy_(logits)
    largest = found.amax(1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    mine = (target >= 0) & (target < vocab)
    picked = torch.where(mine, found.gather(1, target.clamp(0, vocab - 1)), 0.0)[:, 0]
    found.sub_(largest[:, None]).exp_()
    sums = torch.stack([found.sum(1), picked])
    dist.all_reduce(sums, group=group)
    return found.div_(sums[0][:, None]), sums[1], sums[0].log() + largest


def balancing_loss(
    routers: tuple[torch.Tensor, ...], mask: torch.Tensor, weights: torch.Tensor, experts_per_token: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The balancing loss of experts, summed over tokens, and tokens sent to each expert.

    `routers`: for each layer with experts the logits [rows * length, experts]; `mask` [rows, length]: 1 for the tokens
    that count; `weights` [rows, length]: what their loss counts. Switch Transformer's loss (arXiv 2101.03961, equations
    4-6), experts * sum of share * mean probability, 1 when balanced; shares are those of the top-k slots. It is taken row
    by row, as DeepSeek-V3 does (arXiv 2412.19437, equations 17-20), because then it does not depend on how a batch is
    cut into micro batches and among workers. Mean over layers, row by row times the row's weights.

    Returns (a scalar, counts [layers, experts] float32).
    """
    rows, length = mask.shape
    tokens = mask.sum(1).clamp(min=1)
    row_weights = weights.sum(1)
    total = mask.new_zeros(())
    counts = []
    for logits in routers:
        experts = logits.shape[-1]
        probability = logits.float().softmax(-1).view(rows, length, experts)
        chosen = probability.detach().topk(experts_per_token, -1).indices
        slots = mask.new_zeros(rows, experts).scatter_add_(
            1, chosen.reshape(rows, -1), mask.repeat_interleave(experts_per_token, 1)
        )
        share = slots / (tokens * experts_per_token)[:, None]
        mean = (probability * mask[:, :, None]).sum(1) / tokens[:, None]
        total = total + (experts * (share * mean).sum(1) * row_weights).sum()
        counts.append(slots.sum(0))
    return total / len(routers), torch.stack(counts)


def expert_load(counts: torch.Tensor) -> dict[str, Any]:
    """How evenly experts are used, from `expert_tokens` summed over micro batches and workers.

    `max_over_mean`: the busiest expert of any layer over the mean (1 is balanced); `unused`: experts that got no token;
    `shares`: for every layer the share of slots by expert.
    """
    found = counts.double().cpu()
    mean = found.mean(1, keepdim=True).clamp(min=1e-9)
    return {
        "max_over_mean": float((found / mean).max()),
        "unused": int((found == 0).sum()),
        "shares": [[round(float(share), 6) for share in row / row.sum().clamp(min=1)] for row in found],
    }
