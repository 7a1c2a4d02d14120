"""Loss of texts under a causal language model: how well a model of Danlu's own (or any in Hugging Face layout) predicts them.

A text longer than the context is read by windows that overlap: each token is predicted once, from at least
`context - stride` tokens before it (fewer only at the start). Windows of a batch of texts are sorted by length and run
together, a bounded number of tokens at once.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster import storage
from operators.tokens.encode import Encoder, TokenizerFiles

_CHARACTERS_A_TOKEN = 16
_CONTEXT = 1024
_LOSS_ROWS = 512


@dataclass(frozen=True)
class Loaded:
    """A model on its device, its tokenizer, and the token that stands before a text (its bos, else its eos; may be none)."""

    model: Any
    encoder: Encoder
    start: int | None
    context: int
    device: str


def load(path: str, device: str, dtype: str) -> Loaded:
    """The model in a directory or URI, cached for the process.

    Raises FileNotFoundError when model or tokenizer are absent, ValueError when the directory holds no causal model.
    """
    if not storage.exists(storage.join(path, "config.json")):
        raise FileNotFoundError(
            f"no model at {path}: name a directory that holds config.json, model.safetensors and tokenizer.json"
        )
    stamp = "" if storage.is_remote(path) else str(os.stat(storage.local_path(storage.join(path, "config.json"))).st_mtime_ns)
    return _load(path, device, dtype, stamp)


@functools.lru_cache(maxsize=2)
def _load(path: str, device: str, dtype: str, stamp: str) -> Loaded:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = TokenizerFiles.load(path)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    with tempfile.TemporaryDirectory() as directory:
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                _local(path, directory),
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"{path} holds no causal model in safetensors: {error}") from error
        model.to(chosen).eval()
    encoder = Encoder(tokenizer.model)
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    if encoder.vocab_size > vocabulary:
        raise ValueError(f"{path}: the tokenizer has {encoder.vocab_size} tokens, the model {vocabulary}")
    start = next((found for found in map(tokenizer.token_id, ("bos_token", "eos_token")) if found is not None), None)
    context = int(getattr(model.config, "max_position_embeddings", None) or 1024)
    return Loaded(model, encoder, start, context, chosen)


def _local(path: str, directory: str) -> str:
    """A local directory with the model's files: itself, or a copy of a remote one."""
    if not storage.is_remote(path):
        return str(storage.local_path(path))
    for entry in storage.list_files(path):
        target = os.path.join(directory, entry.relative)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as out, storage.open_input(entry.path) as stream:
            while block := stream.read(8 << 20):
                out.write(block)
    return directory


def losses(
    loaded: Loaded,
    texts: pa.Array,
    *,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 2048,
) -> tuple[np.ndarray, np.ndarray]:
    """(summed negative log-likelihood in nats float64[texts], predicted tokens int64[texts]).

    Of a longer text the first `max_tokens` tokens of its first 16 x `max_tokens` characters are read. The start token is
    never predicted; a model without one does not predict the first token of a text.
    """
    context = min(context or _CONTEXT, loaded.context)
    stride = min(stride or max(1, context // 2), context - 1)
    if max_tokens is not None:
        texts = pc.utf8_slice_codeunits(texts, 0, _CHARACTERS_A_TOKEN * max_tokens)
    ids, offsets = loaded.encoder.encode(texts)
    windows: list[tuple[int, np.ndarray, int]] = []  # text, tokens, index of the first one that is predicted
    for row in range(len(texts)):
        found = ids[offsets[row] : offsets[row + 1]][:max_tokens].astype(np.int64)
        if loaded.start is not None:
            found = np.r_[loaded.start, found]
        windows += [(row, found[begin:end], first) for begin, end, first in _windows(len(found), context, stride)]
    total, count = _sums(loaded, windows, len(texts), batch_tokens), np.zeros(len(texts), np.int64)
    for row, tokens, first in windows:
        count[row] += len(tokens) - first
    return total, count


def sequence_losses(loaded: Loaded, sequences: Sequence[tuple[np.ndarray, int]], batch_tokens: int = 2048) -> np.ndarray:
    """float64[sequences], summed negative log-likelihood in nats of the tokens from a place on, given those before.

    A sequence is (token ids int64, index of the first that is predicted, at least 1); it must fit the model's context.
    """
    windows = [(row, tokens, first) for row, (tokens, first) in enumerate(sequences)]
    return _sums(loaded, windows, len(windows), batch_tokens)


def _sums(loaded: Loaded, windows: list[tuple[int, np.ndarray, int]], rows: int, batch_tokens: int) -> np.ndarray:
    """float64[rows]: the losses of windows (row, tokens, first predicted one), added up; run in batches of similar length."""
    total = np.zeros(rows)
    ordered = sorted(windows, key=lambda item: -len(item[1]))  # stable: rows in order among equals
    begin = 0
    while begin < len(ordered):
        size = max(1, batch_tokens // len(ordered[begin][1]))
        batch = ordered[begin : begin + size]
        for (row, _, _), sums in zip(batch, _run(loaded, batch), strict=True):
            total[row] += sums
        begin += size
    return total


def _windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first predicted token inside) of the windows over `length` tokens; token 0 is never predicted."""
    found, begin, done = [], 0, 1
    while done < length:
        end = min(begin + context, length)
        found.append((begin, end, done - begin))
        begin, done = begin + stride, end
    return found


def _run(loaded: Loaded, batch: list[tuple[int, np.ndarray, int]]) -> list[float]:
    """The summed negative log-likelihood of each window. Padding stands behind, where a causal model cannot look."""
    import torch
    import torch.nn.functional as F

    longest = max(len(tokens) for _, tokens, _ in batch)
    padded = np.zeros((len(batch), longest), np.int64)
    targets = np.full((len(batch), longest), -100, np.int64)
    for row, (_, tokens, first) in enumerate(batch):
        padded[row, : len(tokens)] = tokens
        targets[row, first : len(tokens)] = tokens[first:]
    with torch.inference_mode():
        logits = loaded.model(torch.from_numpy(padded).to(loaded.device), use_cache=False).logits
        flat = logits.reshape(-1, logits.shape[-1])
        following = np.full_like(targets, -100)
        following[:, :-1] = targets[:, 1:]
        wanted = torch.from_numpy(following.reshape(-1)).to(loaded.device)
        nats = [  # piece by piece: the logits are by far the largest thing here, and the loss works on a copy
            F.cross_entropy(flat[begin : begin + _LOSS_ROWS].float(), wanted[begin : begin + _LOSS_ROWS], reduction="none")
            for begin in range(0, len(wanted), _LOSS_ROWS)
        ]
        return torch.cat(nats).double().reshape(len(batch), longest).sum(dim=1).cpu().tolist()
