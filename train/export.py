"""Write a model with adapters merged in: what a serving engine loads without PEFT, and what trains on as a plain model."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from cluster import storage
from train import adapters, artifacts, models, samples
from train.parallel import Workers
from train.settings_finetune import MergeJob

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PROBE_TOKENS = 64


def run(job: MergeJob, directory: str, workers: Workers) -> dict[str, Any]:
    """Merge, write `directory`/model, and say how far its logits are from those of base + adapters on a row of tokens.

    The first worker does it, on its CPU: the base as it is stored, one layer at a time in float32. Raises FileNotFoundError
    and ValueError for what is no model, no adapter, quantised, or no adapter of this base.
    """
    result = workers.share(workers.on_first(lambda: _merge(job, directory)))
    return dict(result)


def _merge(job: MergeJob, directory: str) -> dict[str, Any]:
    known = samples.read_result(directory)
    if known is not None:
        return known
    started = time.perf_counter()
    parts = [adapters.checked(path) for path in job.adapters]
    model: Any = _as_stored(job.model)
    target = _DTYPES[job.dtype] if job.dtype is not None else next(model.parameters()).dtype
    generation = model.generation_config
    for number, part in enumerate(parts):
        try:
            adapted = adapters.attach(model, part)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the adapter at {job.adapters[number]} does not fit the base {job.model}: {error}") from error
        expected = _logits(adapted)
        # Between adapters weights stay float32: what is cast is the whole sum.
        model = adapters.merge(adapted, target if number + 1 == len(parts) else torch.float32)
    difference = float((_logits(model) - expected).abs().max())
    model.config.use_cache = True
    model.generation_config = generation
    tokenizer = models.load_tokenizer(job.adapters[-1] if _has_tokenizer(job.adapters[-1]) else job.model)
    destination = storage.join(directory, "model")
    with artifacts.building(destination) as local:
        model.save_pretrained(local, max_shard_size=job.max_shard_size)
        tokenizer.save_pretrained(local)
        shards = sorted(local.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in shards)
    result = {
        "parameters": models.parameter_counts(model)[0],
        "adapters": len(parts),
        "dtype": str(model.config.dtype).removeprefix("torch."),
        "bytes": size,
        "files": len(shards),
        "largest_logit": float(expected.abs().max()),
        "largest_logit_difference": difference,
        "timings": {"seconds": time.perf_counter() - started},
    }
    return samples.write_result(directory, result)


def _as_stored(path: str) -> PreTrainedModel:
    """The base in the dtype of its files. Raises ValueError for a quantised one."""
    if adapters.find(path) is not None:
        return models.load(path)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        models.model_directory(path),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype="auto",
        attn_implementation="sdpa",
    )
    return model


def _has_tokenizer(path: str) -> bool:
    return storage.exists(storage.join(path, "tokenizer_config.json"))


def _logits(model: Any) -> torch.Tensor:
    """float32[tokens, vocabulary] over a fixed row of tokens spread over the vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    row = (torch.arange(_PROBE_TOKENS, device=model.device) * 7919 % vocabulary)[None]
    with torch.no_grad():
        return model.eval()(input_ids=row, use_cache=False).logits[0].float()
