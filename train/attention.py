"""Attention over packed rows: documents do not see each other, and nothing is computed for pairs of tokens that may not.

A packed row holds several documents; `position_ids` restart at each of them. Where they restart is found once a batch
(`Documents.of`) and handed to every block of a transformers model, which calls `packed_attention` in place of its own
(transformers' AttentionInterface, name `danlu_packed`). Four exact forms of one function:

- `slices`   CPU: torch's flash kernel on each document alone, forward and backward, as one custom operator. Cost is the
             sum of squares of document lengths rather than rows times length squared.
- `varlen`   CUDA, bf16 or fp16: `torch.nn.attention.varlen` (Flash Attention with cu_seqlens).
- `flex`     CUDA, any type: FlexAttention with a block mask.
- `mask`     anywhere: the plain block-diagonal mask. The reference of the tests.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.modeling_utils import PreTrainedModel

NAME = "danlu_packed"
"""The name under which transformers knows `packed_attention`."""

Form = Literal["slices", "varlen", "flex", "mask"]

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_SHORT = 384
"""Tokens up to which torch's backward kernel is faster on CPU in float32 than in bf16, by 2 to 4 times (measured with
AVX-512 and no AMX; both are equal at 400, and bf16 is 1.4 times faster at 1,024)."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch of packed rows begin: computed once, used by every block.

    `bounds` [documents + 1], int32: the first flat position (row * length + column) of each document, then the number of
    positions. `longest` is the length of the longest document, `limit` the next power of two: what a kernel is told, so
    that a compiled block meets few different values.
    """

    bounds: torch.Tensor
    longest: int
    limit: int
    form: Form
    mask: torch.Tensor | BlockMask | None = None

    @classmethod
    def of(cls, position_ids: torch.Tensor, form: Form | None = None, dtype: torch.dtype = torch.float32) -> Documents:
        """The documents of rows whose `position_ids` [rows, length] restart at 0 with every document.

        `dtype` is what attention will be computed in; with the device it decides the form unless one is given. Give
        position ids that lie on the host where you can: on a GPU this waits for the device. Raises ValueError when a
        row does not begin with position 0.
        """
        return cls.on(position_ids, position_ids.device, form, dtype)

    @classmethod
    def on(
        cls, position_ids: torch.Tensor, device: torch.device, form: Form | None = None, dtype: torch.dtype = torch.float32
    ) -> Documents:
        """Like `of`, for a batch whose other tensors lie on `device`."""
        rows, length = position_ids.shape
        starts = torch.nonzero(position_ids.reshape(-1) == 0).flatten().to("cpu", torch.int32)
        bounds = torch.cat([starts, torch.tensor([rows * length], dtype=torch.int32)])
        if rows * length == 0 or int(torch.isin(torch.arange(rows, dtype=torch.int32) * length, starts).sum()) != rows:
            raise ValueError("every packed row must begin a document: position_ids[:, 0] must be 0")
        longest = int(bounds.diff().max())
        form = form or choose(device, dtype)
        if form == "slices" and device.type != "cpu":
            raise ValueError(f"attention in slices runs on CPU, not on {device}")
        mask: torch.Tensor | BlockMask | None = None
        if form in ("mask", "flex"):
            document = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff().long()).view(rows, length).to(device)
            if form == "mask":
                causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
                mask = ((document[:, :, None] == document[:, None, :]) & causal)[:, None]
            else:
                mask = _block_mask(document)
        if device.type == "cuda":
            bounds = bounds.pin_memory().to(device, non_blocking=True)
        return cls(bounds, longest, 1 << (longest - 1).bit_length(), form, mask)


def choose(device: torch.device, dtype: torch.dtype) -> Form:
    """The fastest exact form on a device for queries of a type."""
    if device.type == "cpu":
        return "slices"
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(device) >= (8, 0):
        return "varlen"
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "flex"
    return "mask"


def use(model: PreTrainedModel) -> None:
    """Make a causal language model call `packed_attention` in every block.

    Raises ValueError when the model's attention is not one that can be computed so: a class that does not let its
    attention be replaced, or blocks that are no attention (linear attention, chunks).
    """
    if not model._supports_attention_backend:
        raise ValueError(f"{type(model).__name__} does not let its attention be replaced, so packed documents would see each other")
    config = model.config.get_text_config()
    foreign = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    if foreign:
        raise ValueError(f"{type(model).__name__} has blocks of kind {foreign}, in which packed documents cannot be kept apart")
    model.set_attn_implementation(NAME)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within documents, as transformers' blocks call it.

    `query` [rows, heads, length, width], `key` and `value` [rows, kv_heads, length, width]; returns
    [rows, length, heads, width]. A sliding window as long as the longest document changes nothing. Raises ValueError
    when `documents` were not given, or for what none of the forms computes (dropout, soft caps, sinks, a mask).
    """
    if documents is None:
        raise ValueError(
            "packed attention was called without documents: a model in a PackedLoss is run by it, or by "
            "network(..., documents=Documents.of(position_ids)); for anything else call set_attn_implementation('sdpa') first"
        )
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if rest.get(name) is not None]
    if dropout or attention_mask is not None or unknown:
        what = unknown or (["attention dropout"] if dropout else ["an attention mask"])
        raise ValueError(f"packed attention does not compute {', '.join(what)}, which {type(module).__name__} asks for")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # custom operators are not cast by autocast; rotary embeddings leave queries and keys in float32
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if documents.form != "varlen" and sliding_window is not None and sliding_window < documents.longest:
        raise ValueError(
            f"a document of {documents.longest} tokens is longer than the model's attention window of {sliding_window}: pack "
            "documents of at most that length, or train in bf16 on a GPU"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if documents.form == "slices":
        return attend_slices(query, key, value, documents.bounds, scale)[0], None
    if documents.form == "varlen":
        return _attend_varlen(query, key, value, documents, scale, sliding_window), None
    if documents.form == "flex":
        return _attend_flex(query, key, value, documents.mask, scale), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = documents.mask
    assert isinstance(mask, torch.Tensor)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scale: float, window: int | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, length, width = query.shape
    q, k, v = (x.transpose(1, 2).reshape(rows * length, x.shape[1], width) for x in (query, key, value))
    found = varlen_attn(
        q, k, v, documents.bounds, documents.bounds, documents.limit, documents.limit,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), enable_gqa=heads != key.shape[1],
    )  # fmt: skip
    assert isinstance(found, torch.Tensor)
    return found.view(rows, length, heads, width)


def _block_mask(document: torch.Tensor) -> BlockMask:
    rows, length = document.shape

    def within(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (document[row, query] == document[row, key])

    return create_block_mask(within, rows, None, length, length, device=document.device)


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _attend_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
    attend = _compiled_flex() if query.device.type == "cuda" and not torch.compiler.is_compiling() else flex_attention
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]).transpose(1, 2)


def _spans(bounds: torch.Tensor, length: int) -> Sequence[tuple[int, int, int]]:
    """(row, first column, column after the last) of every document."""
    edges = bounds.tolist()
    return [(a // length, a % length, a % length + b - a) for a, b in itertools.pairwise(edges)]


@torch.library.custom_op("danlu::attend_slices", mutates_args=())
def attend_slices(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of each document alone, on CPU.

    `query` [rows, heads, length, width], `key`, `value` [rows, kv_heads, length, width], `bounds` as in Documents.
    Returns (output [rows, length, heads, width], logsumexp [heads, rows * length] float32).
    """
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    output = query.new_empty(rows, length, heads, width)
    logsumexp = query.new_empty(heads, rows * length, dtype=torch.float32)
    for row, start, end in _spans(bounds, length):
        q, k, v = (x[row : row + 1, :, start:end] for x in (query, key, value))
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        found, sums = _FLASH(q, k, v, 0.0, True, scale=scale)
        output[row : row + 1, start:end] = found.transpose(1, 2)
        logsumexp[:, row * length + start : row * length + end] = sums.view(heads, end - start)
    return output, logsumexp


@attend_slices.register_fake
def _(query, key, value, bounds, scale):  # type: ignore[no-untyped-def]
    rows, heads, length, width = query.shape
    return query.new_empty(rows, length, heads, width), query.new_empty(heads, rows * length, dtype=torch.float32)


@torch.library.custom_op("danlu::attend_slices_backward", mutates_args=())
def attend_slices_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend_slices` in the shapes of query, key and value, given that of its output."""
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    # in the layout of the projections that these gradients flow into
    found = [x.new_empty(rows, length, x.shape[1], width).transpose(1, 2) for x in (query, key, value)]
    for row, start, end in _spans(bounds, length):
        q, k, v = (x[row : row + 1, :, start:end] for x in (query, key, value))
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        g, o = (x[row : row + 1, start:end].transpose(1, 2) for x in (grad, output))
        if end - start <= _SHORT:
            q, k, v, g, o = q.float(), k.float(), v.float(), g.float(), o.float()
        sums = logsumexp[:, row * length + start : row * length + end].unsqueeze(0).contiguous()
        parts = _FLASH_BACKWARD(g, q, k, v, o, sums, 0.0, True, scale=scale)
        for target, part in zip(found, parts, strict=True):
            if part.shape[1] != target.shape[1]:
                part = part.view(1, target.shape[1], groups, end - start, width).sum(2)
            target[row : row + 1, :, start:end] = part
    return found[0], found[1], found[2]


@attend_slices_backward.register_fake
def _(grad, query, key, value, output, logsumexp, bounds, scale):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, bounds, scale = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)
    ctx.scale = scale


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    query, key, value, output, logsumexp, bounds = ctx.saved_tensors
    return *attend_slices_backward(grad, query, key, value, output, logsumexp, bounds, ctx.scale), None, None


attend_slices.register_autograd(_backward, setup_context=_save)
