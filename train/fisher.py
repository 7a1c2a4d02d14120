"""The diagonal of a model's Fisher information, as a job of the training workers.

F_i is the mean over sequences of the square of d log p(sequence) / d theta_i: squares of each sequence's own gradient, not of
a batch's mean, so every sequence has a backward pass of its own. With `labels: sampled` the token at every position is drawn
from the model's own distribution given the text before it: gradients at different positions are then uncorrelated with mean
zero, and the expectation of their squared sum is the Fisher information of the model on these contexts (Martens 2020,
section 5). With `labels: observed` it is the empirical Fisher, which is no Fisher information away from a perfect fit
(Kunstner, Balles and Hennig 2019).

Sequences are dealt out among workers and their squares summed; sequence k and its draws are functions of (seed, k), so the
number of workers changes nothing but the order of a float32 sum. The result is divided by its mean over all weights: penalties
on models of any size then take the same strengths. `previous` is accumulated as in online EWC (Schwarz et al. 2018):
decay x previous + F, each task normalised by itself, anchored at the newest model.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from cluster import storage
from operators import shards
from train import checkpoint, ewc, finetune, models, rehearsal, samples
from train.errors import JobCancelled, NonFiniteLoss
from train.loader import IGNORE, Batch, PackedTokens, tokenizer_file
from train.mixture import Draw, Mixture
from train.parallel import Workers
from train.pretrain import packed_logits
from train.settings import RowsInput
from train.settings_fisher import FisherJob
from train.sft import encode_conversations

_REPORT_EVERY = 10


@dataclass(frozen=True)
class Sequence:
    """int64 arrays of one length: `targets[t]` is the token after t, IGNORE where there is none with loss."""

    number: int  # in the order drawn
    input_ids: np.ndarray
    position_ids: np.ndarray
    targets: np.ndarray


def run(job: FisherJob, directory: str, workers: Workers) -> dict[str, Any]:
    """Estimate and write `directory`/fisher, which the setting `ewc` of training stages takes.

    Called again after a crash it goes on from the last checkpoint. Raises JobCancelled, NonFiniteLoss, ValueError when no
    sequence has a token with loss or `previous` is of another model's weights.
    """
    root = storage.join(directory, "checkpoints")
    finished = workers.share(samples.read_result(directory) if workers.first else None)
    if finished is not None:
        workers.on_first(lambda: storage.delete(root))
        return finished

    def prepare() -> tuple[Any, ...]:
        previous = None if job.previous is None else ewc.Diagonal.read(job.previous)
        model, tokenizer = models.load(job.model), models.load_tokenizer(job.model)
        model.to(workers.device).eval()  # type: ignore[arg-type]
        drawn, mixture = draw(job)
        return previous, model, tokenizer, drawn, mixture

    previous, model, tokenizer, drawn, mixture = workers.together(prepare)
    estimate = _Estimate(job, root, workers, model)
    workers.together(estimate.resume)
    numbers = np.array(estimate.mine(len(drawn.row)), np.int64)
    sequences, aside = workers.together(lambda: read(job, drawn, numbers, model, tokenizer))
    estimate.accumulate(sequences, len(drawn.row))
    counted = Counter[str]()
    for part in workers.gather(dict(aside)):
        counted.update(part)
    used = int(workers.sum(torch.tensor([estimate.used], dtype=torch.float64, device=workers.device)).item())
    tokens = int(workers.sum(torch.tensor([estimate.tokens], dtype=torch.float64, device=workers.device)).item())
    estimate.reduce()
    if not used:
        raise ValueError(f"none of {len(drawn.row)} sequences has a token with loss; set aside: {dict(counted)}")

    def write() -> dict[str, Any]:
        diagonal = {name: value.cpu() / used for name, value in estimate.squares.items()}
        mean = sum(float(value.sum(dtype=torch.float64)) for value in diagonal.values()) / estimate.weights
        if not mean > 0:
            raise ValueError("the Fisher diagonal is zero everywhere: no weight of this model changes what it says")
        for value in diagonal.values():
            value /= mean
        tasks = [{
            "model": job.model, "inputs": [item.name for item in job.inputs], "labels": job.labels, "sequences": used,
            "tokens": tokens, "mean": mean, "factor": 1.0,
        }]  # fmt: skip
        if previous is not None:
            tasks = _accumulated(diagonal, previous, job.decay) + tasks
        description = {"anchor": job.model, "anchor_digest": ewc.weights_digest(job.model), "tasks": tasks}
        ewc.write(storage.join(directory, "fisher"), diagonal, description)
        if 0 not in shards.committed_units(directory):
            samples.write(directory, samples.one_by_one(mixture, len(drawn.row)))
        result = {
            "sequences": used, "tokens": tokens, "samples": len(drawn.row), "set_aside": dict(sorted(counted.items())),
            "parameters": estimate.weights, "mean": mean, "tasks": len(tasks),
            "mixture": samples.shares(mixture.names, drawn.source), "concentration": concentration(diagonal),
            "timings": {
                "step_seconds": estimate.seconds, "workers": workers.world, "device": workers.device.type,
                "tokens_per_second": tokens / estimate.seconds if estimate.seconds else 0.0,
            },
        }  # fmt: skip
        return samples.write_result(directory, result)

    result = workers.share(workers.on_first(write))
    workers.on_first(lambda: storage.delete(root))
    return dict(result)


class _Estimate:
    """Squares of gradients summed so far; between checkpoints each worker holds its own part of the sum."""

    def __init__(self, job: FisherJob, root: str, workers: Workers, model: PreTrainedModel) -> None:
        self.job, self.root, self.workers, self.model = job, root, workers, model
        self.parameters = dict(model.named_parameters())
        self.squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()}
        self.weights = sum(p.numel() for p in self.parameters.values())
        self.done = self.used = self.tokens = 0
        self.seconds = 0.0

    def resume(self) -> None:
        """What the newest checkpoint holds is the first worker's part of the sum."""
        found = checkpoint.latest(self.root)
        if found is None:
            return
        self.done, directory = found
        if self.workers.first:
            for name, value in checkpoint.load_file(directory / ewc.FILE).items():
                self.squares[name].copy_(value)
            state = checkpoint.read_state(directory)
            self.used, self.tokens, self.seconds = state["used"], state["tokens"], state["seconds"]

    def mine(self, until: int) -> range:
        """The sequences of the plan from `done` on that are this worker's."""
        return range(self.done + (self.workers.rank - self.done) % self.workers.world, until, self.workers.world)

    def accumulate(self, sequences: dict[int, Sequence], total: int) -> None:
        """Go through sequences `done`.. of the plan; a checkpoint after every `checkpoint_every` of them."""
        world = self.workers.world
        while self.done < total:
            started = time.perf_counter()
            every = self.job.checkpoint_every
            until = min(total, self.done + _REPORT_EVERY * world, (self.done // every + 1) * every)
            self.workers.together(functools.partial(self._round, sequences, self.mine(until)))
            self.done = until
            self.seconds += time.perf_counter() - started
            stop = self.workers.stop_requested(self.done, total, "sequences", {"tokens": self.tokens * world})
            if self.done < total and (stop or self.done % every == 0):
                self._save()
            if stop and self.done < total:
                raise JobCancelled(f"stopped after sequence {self.done} of {total}; the checkpoint is in {self.root}")

    def _round(self, sequences: dict[int, Sequence], numbers: range) -> None:
        for number in numbers:
            if number in sequences:
                self._add(sequences[number])

    def _add(self, sequence: Sequence) -> None:
        device = self.workers.device
        ids, positions, targets = (
            torch.from_numpy(array)[None].to(device) for array in (sequence.input_ids, sequence.position_ids, sequence.targets)
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.job.precision == "bf16"):
            logits = packed_logits(self.model, ids, positions)[0].float()
        valid = targets[0] != IGNORE
        logits, wanted = logits[valid], targets[0][valid]
        if self.job.labels == "sampled":
            wanted = sampled(logits.detach(), self.job.seed, sequence.number)
        loss = F.cross_entropy(logits, wanted, reduction="sum")
        if not torch.isfinite(loss):
            raise NonFiniteLoss(f"sequence {sequence.number} has the log-likelihood {-loss.item()}: is the model whole?")
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    gradient = parameter.grad.float()
                    self.squares[name].addcmul_(gradient, gradient)
        self.model.zero_grad(set_to_none=True)
        self.used += 1
        self.tokens += int(valid.sum())

    def reduce(self) -> None:
        """Bring the sum of all workers to the first; the others begin again at zero."""
        if self.workers.world == 1:
            return
        for value in self.squares.values():
            self.workers.sum(value)
            if not self.workers.first:
                value.zero_()

    def _save(self) -> None:
        totals = self.workers.sum(torch.tensor([self.used, self.tokens], dtype=torch.float64, device=self.workers.device)).tolist()
        self.used, self.tokens = (int(totals[0]), int(totals[1])) if self.workers.first else (0, 0)
        self.reduce()

        def write() -> None:
            with checkpoint.saving(self.root, self.done) as directory:
                checkpoint.save_file({name: value.cpu() for name, value in self.squares.items()}, directory / ewc.FILE)
                checkpoint.write_state(directory, {"used": self.used, "tokens": self.tokens, "seconds": self.seconds})

        self.workers.on_first(write)


def sampled(logits: torch.Tensor, seed: int, number: int) -> torch.Tensor:
    """A token at each position, int64[positions], drawn from softmax(logits) [positions, vocabulary] by inversion.

    The draws are a function of (seed, number), on any device and any worker.
    """
    uniform = torch.from_numpy(np.random.default_rng([seed, number]).random(len(logits))).to(logits.device)
    cumulated = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True)[:, 0]
    return drawn.clamp_max(logits.shape[-1] - 1)


def draw(job: FisherJob) -> tuple[Draw, Mixture]:
    """Which sequences are used, in order: as many as asked for, but none twice."""
    sizes = [len(PackedTokens(item.directory)) if is_packed(item) else rehearsal.row_numbers(item.directory) for item in job.inputs]
    mixture = Mixture(sizes, [item.weight for item in job.inputs], job.seed, [item.name for item in job.inputs])
    most = int(np.floor((mixture.sizes / mixture.shares).min()))
    found = mixture.locate(np.arange(max(1, min(job.sequences, most))))
    if (found.epoch > 0).any():  # shares are met to within a sample
        found = mixture.locate(np.arange(int(np.argmax(found.epoch > 0))))
    return found, mixture


def is_packed(item: RowsInput) -> bool:
    return "tokens" in shards.load_manifest(item.directory).files


def read(
    job: FisherJob, drawn: Draw, numbers: np.ndarray, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[int, Sequence], Counter[str]]:
    """The sequences of these numbers, and how many rows were set aside and why."""
    found: dict[int, Sequence] = {}
    aside: Counter[str] = Counter()
    for index, item in enumerate(job.inputs):
        mine = numbers[drawn.source[numbers] == index]
        if not mine.size:
            continue
        if is_packed(item):
            found.update(_packed(item, drawn.row[mine], mine, tokenizer))
            continue
        order = np.argsort(drawn.row[mine], kind="stable")
        mine = mine[order]
        whole = rehearsal.holds_documents(item.directory)
        if not whole:
            models.as_chat(tokenizer, model)
        columns = ["id", "text"] if whole else ["id", "messages", "tools"]
        for which, batch in rehearsal.chosen_rows(item.directory, columns, drawn.row[mine]):
            for place, ids, labels in _encoded(batch, whole, tokenizer, aside):
                cut = np.array(ids[: job.max_length], np.int64)
                after = np.append(np.array(labels[1 : job.max_length], np.int64), IGNORE)[: len(cut)]
                if not (after != IGNORE).any():
                    aside["no_token_with_loss"] += 1
                    continue
                number = int(mine[which[place]])
                found[number] = Sequence(number, cut, np.arange(len(cut)), after)
    return found, aside


def _packed(item: RowsInput, rows: np.ndarray, numbers: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> dict[int, Sequence]:
    corpus = PackedTokens(item.directory)
    known = len(tokenizer)
    if corpus.vocab_size > known:
        raise ValueError(
            f"{item.directory} was packed with a tokenizer of {corpus.vocab_size} tokens ({tokenizer_file(item.directory)}), the "
            f"model's has {known}: pack with the model's own"
        )
    shape = (len(rows), corpus.length)
    batch = Batch(np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int64), 0)
    corpus.fill(rows, batch, np.arange(len(rows)))
    return {
        int(number): Sequence(int(number), batch.input_ids[place], batch.position_ids[place], batch.labels[place])
        for place, number in enumerate(numbers)
        if (batch.labels[place] != IGNORE).any()
    }


def _encoded(
    batch: Any, documents: bool, tokenizer: PreTrainedTokenizerBase, aside: Counter[str]
) -> list[tuple[int, list[int], list[int]]]:
    """(row of the batch, ids, labels) of each usable row."""
    batch = batch.append_column("place", np.arange(batch.num_rows))
    if documents:
        kept = rehearsal.usable(batch, tokenizer, aside)
        tokens = rehearsal.encode(tokenizer, kept["text"].to_pylist()) if kept.num_rows else []
        encoded = [(ids, ids) for ids in tokens]
    else:
        kept = finetune.without_control_tokens(batch, ["messages"], tokenizer, aside)
        columns = kept.to_pydict()
        encoded = encode_conversations(tokenizer, columns["messages"], columns["tools"]) if kept.num_rows else []
    places = kept["place"].to_pylist()
    return [(place, ids, labels) for place, (ids, labels) in zip(places, encoded, strict=True)]


def _accumulated(diagonal: dict[str, torch.Tensor], previous: ewc.Diagonal, decay: float) -> list[dict[str, Any]]:
    """Add decay x previous in place; the tasks so far, each with its factor."""
    with ExitStack() as stack:
        before: Any = stack.enter_context(safe_open(previous.directory / ewc.FILE, framework="pt"))
        names = set(before.keys())
        for name, value in diagonal.items():
            if name not in names or before.get_slice(name).get_shape() != list(value.shape):
                raise ValueError(f"previous: {previous.directory} has no weight {name!r} of shape {tuple(value.shape)}")
            value.add_(before.get_tensor(name), alpha=decay)
    return [{**task, "factor": task["factor"] * decay} for task in previous.description["tasks"]]


def concentration(diagonal: dict[str, torch.Tensor]) -> dict[str, float]:
    """The share of the whole diagonal that lies in its largest 1% and 10% of weights, from a histogram by powers of 2^(1/8)."""
    counts, sums = torch.zeros(2048, dtype=torch.float64), torch.zeros(2048, dtype=torch.float64)
    for value in diagonal.values():
        flat = value.flatten().double()
        bins = (flat.clamp_min(1e-30).log2() * 8 + 1024).round().long().clamp(0, 2047)
        counts += torch.bincount(bins, minlength=2048)
        sums += torch.bincount(bins, weights=flat, minlength=2048)
    counts, sums = counts.flip(0).cumsum(0), sums.flip(0).cumsum(0)
    result = {}
    for share in (0.01, 0.1):
        place = int(torch.searchsorted(counts, torch.tensor([share * float(counts[-1])], dtype=torch.float64)).item())
        result[f"largest_{share:.0%}"] = round(float(sums[min(place, 2047)] / sums[-1]), 4)
    return result
