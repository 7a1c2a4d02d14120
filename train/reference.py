"""What the reference model says of preference pairs, computed once and kept by content.

Preference losses compare the model with the one it started from. Instead of a second copy of it in memory (or a second
forward pass a step, with adapters), its log-probabilities are computed before training with the very model that will be
trained, by all workers of the job, in units of 256 pairs that are kept in a directory named by

    (files of the model and of its adapters, tokenizer and chat template, max_length, precision, quantisation, versions)

under a name that is the hash of the encoded pairs themselves. So a job that was killed does only the units left, another
stage or run with the same model and pairs does none, and changed weights, templates or pairs can never meet old values.
A unit is computed by one worker, in passes that depend on its pairs alone: the same numbers on any number of workers.

Units hold the pairs in the order in which training first takes them: more steps of the same plan keep the units there are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from cluster import storage
from operators.synthesis.packaged import content_revision
from train import adapters, artifacts, sharding
from train.errors import JobCancelled
from train.finetune import Examples
from train.parallel import Workers
from train.settings_finetune import DpoJob, KtoJob

PAIRS = ("prompt_ids", "chosen_ids", "rejected_ids")
UNIT = 256  # pairs; what a kill costs at most, on each worker
_VERSION = 1
_VALUES = 6  # sums over all tokens, over those that both replies have, and over the rest: of the chosen and the rejected reply
_PASS_TOKENS = {"cpu": 4_096, "cuda": 32_768}


def attach(
    job: DpoJob | KtoJob,
    model: Any | None,
    load: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    order: np.ndarray,
    directory: str,
    workers: Workers,
) -> Examples:
    """The examples with the reference's log-probabilities of every pair that `order` takes, as TRL's DPO reads them.

    `model` is the reference: the one that is to be trained, before any step and without a fresh adapter. None where the job
    cuts it among the workers: then, if there is something to do, `load` gives one that is cut here and given up again.
    `directory` is the cache. Raises JobCancelled when the user stopped (finished units stay), ValueError for
    log-probabilities that are not finite.
    """
    folder = storage.join(directory, workers.share(workers.on_first(lambda: _describe(job, tokenizer, directory))))
    _, first = np.unique(order, return_index=True)
    rows = order[np.sort(first)]
    units = [rows[start : start + UNIT] for start in range(0, len(rows), UNIT)]
    names = workers.together(lambda: [_name(examples.table, unit) for unit in units])
    there = workers.share(workers.on_first(lambda: _present(folder)))
    missing = [index for index, name in enumerate(names) if name not in there]
    if missing:
        if model is None:
            model = workers.together(load)
        _compute(job, model, tokenizer, examples, [(units[index], names[index]) for index in missing], folder, workers)
    values = np.full((examples.table.num_rows, _VALUES), np.nan, np.float32)

    def read() -> None:
        for unit, name in zip(units, names, strict=True):
            values[unit] = _read(storage.join(folder, name), len(unit))
        if len(lost := rows[~np.isfinite(values[rows]).all(axis=1)]):
            key = pa.chunked_array(examples.ids, pa.string())[int(lost[0])].as_py()
            raise ValueError(
                f"the reference model {job.model} has no finite log-probability for {len(lost)} pairs, the first of them {key!r}: "
                "look at the model's weights, or use precision fp32"
            )

    workers.together(read)
    ld_alpha = job.ld_alpha if isinstance(job, DpoJob) else None
    columns = values[:, 0:2] if ld_alpha is None else values[:, 2:4] + np.float32(ld_alpha) * values[:, 4:6]
    table = examples.table
    for name, column in zip(("ref_chosen_logps", "ref_rejected_logps"), columns.T, strict=True):
        table = table.append_column(name, pa.array(np.ascontiguousarray(column)))
    return dataclasses.replace(examples, table=table)


def is_cut(job: DpoJob | KtoJob, workers: Workers) -> bool:
    """True when no worker holds the whole model."""
    return job.sharding == "fsdp2" and workers.world > 1


def _describe(job: DpoJob | KtoJob, tokenizer: PreTrainedTokenizerBase, directory: str) -> str:
    """The name of the reference: a hash of all that its values depend on besides the pairs, which is written down beside them."""
    cache = str(artifacts.cache_directory())
    identity = {
        "version": _VERSION,
        "model": [content_revision(part, cache) for part in adapters.directories(job.model)],
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "chat_template": hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest(),
        "max_length": job.max_length,
        "precision": job.precision,
        "quantize": job.lora.quantize if job.lora is not None else "none",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    about = {**identity, "path": job.model, "unit": UNIT}
    storage.create_if_absent(storage.join(directory, name, "reference.json"), json.dumps(about, indent=1).encode())
    return name


def _name(table: pa.Table, unit: np.ndarray) -> str:
    """A file name that is the hash of the unit's encoded pairs."""
    taken = table.select(list(PAIRS)).take(pa.array(unit)).combine_chunks()
    digest = hashlib.sha256()
    for name in PAIRS:
        for chunk in taken.column(name).chunks:
            digest.update(np.diff(chunk.offsets.to_numpy()).tobytes())
            digest.update(chunk.flatten().to_numpy().tobytes())
    return digest.hexdigest()[:32] + ".npy"


def _present(folder: str) -> set[str]:
    return {entry.relative for entry in storage.list_files(folder) if entry.relative.endswith(".npy")}


def _read(path: str, count: int) -> np.ndarray:
    """float32[count, 6] of a unit. Raises ValueError for a damaged file."""
    try:
        values = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and it is computed again") from error
    if values.shape != (count, _VALUES) or values.dtype != np.float32:
        raise ValueError(f"{path} holds {values.dtype}{list(values.shape)} instead of float32[{count}, {_VALUES}]; delete it")
    return np.asarray(values)


def _compute(
    job: DpoJob | KtoJob,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    missing: Sequence[tuple[np.ndarray, str]],
    folder: str,
    workers: Workers,
) -> None:
    """Do the missing units, one a worker and round. All workers call it with the same arguments."""
    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=job.max_length)
    budget = _PASS_TOKENS["cuda" if workers.device.type == "cuda" else "cpu"]
    cut = is_cut(job, workers)
    total = sum(len(unit) for unit, _ in missing)
    done = 0
    with _scoring(model, job, workers, cut):
        for start in range(0, len(missing), workers.world):
            together = missing[start : start + workers.world]
            mine = together[workers.rank] if workers.rank < len(together) else None
            # A sharded model is put together anew for each forward pass, by all workers: each must make as many.
            passes = max(len(_passes(examples.table, unit, job.max_length, budget)) for unit, _ in together) if cut else 0
            unit, name = mine if mine is not None else (together[0][0][:1], "")
            values = _score(model, collator, examples.table, unit, job.max_length, budget, workers.device, passes)
            if mine is not None:
                stream = io.BytesIO()
                np.save(stream, values, allow_pickle=False)
                storage.write_bytes(storage.join(folder, name), stream.getvalue())
            done += sum(len(unit) for unit, _ in together)
            if workers.stop_requested(done, total, "pairs of the reference", {}):
                raise JobCancelled(f"stopped after {done} of {total} pairs of the reference; they are kept in {folder}")
        workers.barrier()


@contextmanager
def _scoring(model: Any, job: DpoJob | KtoJob, workers: Workers, cut: bool) -> Iterator[None]:
    """The model ready to be asked for log-probabilities, then as it was before (but where it is cut: it is given up)."""
    training = model.training
    model.eval()
    # Log-probabilities by the kernel that the loss uses: no logits of the whole vocabulary are kept.
    add_fused_lm_head(model)
    if cut:
        sharding.shard(model, workers)
    elif job.lora is None or job.lora.quantize == "none":
        model.to(workers.device)
    try:
        with torch.no_grad(), torch.autocast(workers.device.type, torch.bfloat16, enabled=job.precision == "bf16"):
            yield
    finally:
        del model.forward  # the trainer puts a kernel of its own there
        model.train(training)


def _passes(table: pa.Table, unit: np.ndarray, max_length: int, budget: int) -> list[np.ndarray]:
    """Indices into `unit`, forward pass by forward pass: pairs of like length, `budget` tokens with padding at most."""
    lengths = _lengths(table, unit, max_length).max(axis=1)
    order = np.argsort(-lengths, kind="stable")
    passes = []
    start = 0
    while start < len(order):
        count = max(1, budget // (2 * int(lengths[order[start]])))
        passes.append(order[start : start + count])
        start += count
    return passes


def _lengths(table: pa.Table, unit: np.ndarray, max_length: int) -> np.ndarray:
    """int64[len(unit), 2]: tokens of the prompt with each reply, cut."""
    taken = table.select(list(PAIRS)).take(pa.array(unit))
    prompt, *replies = (pa.compute.list_value_length(taken.column(name)).to_numpy() for name in PAIRS)
    return np.minimum(np.stack([prompt + reply for reply in replies], axis=1), max_length)


def _score(
    model: Any,
    collator: DataCollatorForPreference,
    table: pa.Table,
    unit: np.ndarray,
    max_length: int,
    budget: int,
    device: torch.device,
    at_least: int,
) -> np.ndarray:
    """float32[len(unit), 6]: log-probabilities of the replies of a unit; the model is called `at_least` so often."""
    values = np.empty((len(unit), _VALUES), np.float32)
    passes = _passes(table, unit, max_length, budget)
    for number in range(max(len(passes), at_least)):
        chosen = passes[min(number, len(passes) - 1)]
        rows = table.select(list(PAIRS)).take(pa.array(unit[chosen])).to_pylist()
        values[chosen] = _sums(model, {key: value.to(device) for key, value in collator(rows).items()})
    return values


def _sums(model: Any, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """float32[pairs, 6] of one forward pass, summed as TRL's DPO trainer sums the trained model's."""
    mask = batch["completion_mask"]
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    asked = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    scores = model(**asked, labels=labels, fused_lm_head=True).log_probs
    place = mask[:, 1:].cumsum(dim=1)
    lengths = mask[:, 1:].sum(dim=1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
    both = (place > 0) & (place <= shared)
    sums = [scores.sum(dim=1), (scores * both).sum(dim=1), (scores * (place > shared)).sum(dim=1)]
    return torch.stack([half for total in sums for half in total.chunk(2)], dim=1).float().cpu().numpy()
