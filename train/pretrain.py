"""Pretraining: a short loop over packed sequences, data parallel, exact to the sample.

The loss of a step is the sum over all workers' tokens divided by their number, so it does not depend on how the batch
was cut. Run it as one process, under torchrun, or as a job of a Ray Train group:

    python -m train.pretrain job.json OUTPUT_DIRECTORY
    torchrun --nproc-per-node 2 -m train.pretrain job.json OUTPUT_DIRECTORY
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_utils import PreTrainedModel

from cluster import storage
from operators.config import parse
from train import checkpoint, models, samples
from train.errors import JobCancelled, NonFiniteLoss
from train.loader import IGNORE, Batch, PackedTokens, TokenLoader, micro_batches, rank_positions, tokenizer_file
from train.parallel import Workers
from train.settings import PretrainJob
from train.tracking import Tracked


def run(job: PretrainJob, directory: str, workers: Workers) -> dict[str, Any]:
    """Train and export to `directory`/model; write `directory`/parts (which sample was taken in which step).

    Returns {"curve", "parameters", "trainable_parameters", "steps", "tokens", "samples", "mixture", "timings"}. Called
    again after a crash it goes on from the last checkpoint; called again when finished it returns the result on file.
    Raises NonFiniteLoss naming the batch, JobCancelled when the user stopped.
    """
    root = storage.join(directory, "checkpoints")
    finished = workers.share(samples.read_result(directory) if workers.first else None)
    if finished is not None:
        workers.on_first(lambda: storage.delete(root))
        return finished
    loader, tokenizer = workers.together(lambda: _open(job, workers))
    model = workers.together(lambda: _model(job, loader, tokenizer))
    model.to(workers.device)  # type: ignore[arg-type]
    training = _Training(job, directory, workers, loader, model)
    workers.together(training.resume)
    training.train()

    def write() -> dict[str, Any]:
        models.export(model, tokenizer, storage.join(directory, "model"))
        samples.write(directory, samples.pretraining(loader, job.steps, job.batch_sequences))
        return samples.write_result(directory, training.result())

    result = workers.share(workers.on_first(write))
    workers.on_first(lambda: storage.delete(root))
    return result


def _open(job: PretrainJob, workers: Workers) -> tuple[TokenLoader, Any]:
    rank_positions(0, job.batch_sequences, workers.rank, workers.world)
    corpora = [PackedTokens(item.directory) for item in job.inputs]
    loader = TokenLoader(corpora, [item.weight for item in job.inputs], job.seed, [item.name for item in job.inputs])
    return loader, models.wrap_tokenizer(tokenizer_file(job.inputs[0].directory))


def _model(job: PretrainJob, loader: TokenLoader, tokenizer: Any) -> PreTrainedModel:
    if isinstance(job.model, str):
        model = models.load(job.model)
        if model.config.vocab_size < loader.corpora[0].vocab_size:
            raise ValueError(
                f"the model at {job.model} knows {model.config.vocab_size} tokens, the packed corpus was made with "
                f"{loader.corpora[0].vocab_size}: pack with the model's own tokenizer"
            )
        return model
    index = loader.corpora[0].index
    config = models.configuration(
        job.model, loader.corpora[0].vocab_size, loader.length, index.get("eos_token_id"), tokenizer.pad_token_id
    )
    return models.create(config, job.seed)


class _Training:
    """The loop's state: model, optimizer, how many steps and tokens are done, and the curve so far."""

    def __init__(self, job: PretrainJob, directory: str, workers: Workers, loader: TokenLoader, model: PreTrainedModel) -> None:
        self.job, self.workers, self.loader, self.model = job, workers, loader, model
        self.root = storage.join(directory, "checkpoints")
        self.parameters = dict(model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        vectors = [p for p in self.parameters.values() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": job.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=job.learning_rate,
            betas=job.betas,
        )
        self.step = self.tokens = 0
        self.curve: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.timed_tokens = 0
        torch.manual_seed(job.seed * 1_000_003 + workers.rank)

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        found = checkpoint.latest(self.root)
        if found is None:
            return
        step, directory = found
        state = checkpoint.read_state(directory)
        if state["batch_sequences"] != self.job.batch_sequences:
            raise ValueError(f"{directory} was written with batches of {state['batch_sequences']} sequences")
        position = self.loader.resume(state["loader"])
        if position != step * self.job.batch_sequences:
            raise ValueError(f"{directory} stands at sample {position}, which is not the start of step {step}")
        weights = checkpoint.load_file(directory / "model.safetensors")
        for name, parameter in self.parameters.items():
            parameter.data.copy_(weights[name])
        checkpoint.load_optimizer(self.optimizer, self.parameters, directory / "optimizer.safetensors")
        random = checkpoint.load_random_states(directory / "random.safetensors")
        mine = random.get(f"{self.workers.rank}/cpu")
        if mine is not None:
            torch.set_rng_state(mine)
        if self.workers.device.type == "cuda" and f"{self.workers.rank}/cuda" in random:
            torch.cuda.set_rng_state(random[f"{self.workers.rank}/cuda"], self.workers.device)
        self.step, self.tokens, self.curve = step, int(state["loader"]["tokens"]), state["curve"]

    def train(self) -> None:
        """All remaining steps."""
        job, workers = self.job, self.workers
        network: torch.nn.Module = self.model
        if workers.world > 1:
            devices = [workers.device.index] if workers.device.type == "cuda" else None
            network = DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True)
        network.train()
        while self.step < job.steps:
            started = time.perf_counter()
            rate = job.learning_rate * job.schedule.factor(self.step, job.steps)
            loss, norm, valid = self._step(network, rate)
            self.seconds += time.perf_counter() - started
            self.step += 1
            self.tokens += valid
            self.timed_tokens += valid
            point = {
                "step": self.step, "loss": round(loss, 6), "learning_rate": rate,
                "gradient_norm": round(norm, 6), "tokens": self.tokens,
            }  # fmt: skip
            self.curve.append(point)
            stop = workers.stop_requested(self.step, job.steps, "steps", point)
            if self.step < job.steps and (stop or self.step % job.checkpoint_every == 0):
                self._save()
            if stop:
                raise JobCancelled(f"stopped after step {self.step} of {job.steps}; the checkpoint is in {self.root}")

    def _step(self, network: torch.nn.Module, rate: float) -> tuple[float, float, int]:
        job, workers = self.job, self.workers
        everyone = np.arange(self.step * job.batch_sequences, (self.step + 1) * job.batch_sequences)
        valid = int(self.loader.valid_tokens(everyone).sum())
        if valid == 0:
            raise ValueError(f"step {self.step}: none of its {job.batch_sequences} sequences has a token with loss")
        batch = self.loader.batch(rank_positions(self.step, job.batch_sequences, workers.rank, workers.world))
        pieces = micro_batches(len(batch.input_ids), job.micro_batch_sequences)
        total = torch.zeros(1, dtype=torch.float64, device=workers.device)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            quiet = nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()
            with quiet:
                loss = self._loss(network, batch, piece)
                # DDP averages gradients over workers; the loss is a mean over all workers' tokens.
                (loss * (workers.world / valid)).backward()
            total += loss.detach().double()
        loss_value = workers.sum(total).item() / valid
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), job.clip))
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            draw = self.loader.locate(everyone)
            rows = ", ".join(f"{self.loader.names[s]}[{r}]" for s, r in zip(draw.source, draw.row, strict=True))
            raise NonFiniteLoss(
                f"step {self.step}: the loss is {loss_value} and the norm of the gradient {norm}, batch of sequences {rows}; "
                f"learning rate {rate:.3g}. Lower the learning rate, lengthen the warm-up, or look at these sequences; "
                f"the last checkpoint is in {self.root}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_value, norm, valid

    def _loss(self, network: torch.nn.Module, batch: Batch, piece: slice) -> torch.Tensor:
        """The summed cross entropy of some rows."""
        device = self.workers.device
        ids, positions, labels = (
            torch.from_numpy(array[piece]).to(device, non_blocking=True)
            for array in (batch.input_ids, batch.position_ids, batch.labels)
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.job.precision == "bf16"):
            logits = packed_logits(network, ids, positions)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")

    def _save(self) -> None:
        states = {f"{self.workers.rank}/cpu": torch.get_rng_state()}
        if self.workers.device.type == "cuda":
            states[f"{self.workers.rank}/cuda"] = torch.cuda.get_rng_state(self.workers.device)
        random = {key: value for part in self.workers.gather(states) for key, value in part.items()}

        def write() -> None:
            with checkpoint.saving(self.root, self.step) as directory:
                weights = {name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}
                checkpoint.save_file(weights, directory / "model.safetensors")
                names = {id(p): name for name, p in self.parameters.items()}
                checkpoint.save_optimizer(self.optimizer, names, directory / "optimizer.safetensors")
                checkpoint.save_random_states(random, directory / "random.safetensors")
                state = {
                    "batch_sequences": self.job.batch_sequences,
                    "loader": self.loader.state(self.step * self.job.batch_sequences, self.tokens),
                    "curve": self.curve,
                }
                checkpoint.write_state(directory, state)

        self.workers.on_first(write)

    def result(self) -> dict[str, Any]:
        job = self.job
        parameters, trainable = models.parameter_counts(self.model)
        positions = np.arange(job.steps * job.batch_sequences)
        draw = self.loader.locate(positions)
        return {
            "curve": samples.thinned(self.curve),
            "parameters": parameters,
            "trainable_parameters": trainable,
            "steps": job.steps,
            "tokens": self.tokens,
            "samples": len(positions),
            "mixture": samples.shares(self.loader.names, draw.source, self.loader.valid_tokens(positions)),
            "timings": {
                "step_seconds": self.seconds,
                "tokens_per_second": self.timed_tokens / self.seconds if self.seconds else 0.0,
                "workers": self.workers.world,
                "device": self.workers.device.type,
            },
        }


def packed_logits(network: torch.nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Logits [rows, length, vocab] of packed rows, documents isolated from each other.

    Where positions restart, transformers masks attention block-diagonally, but only without a cache and without an
    attention mask: with `use_cache` documents would see each other (measured: logits off by 22).
    """
    return network(input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False).logits


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise SystemExit("usage: python -m train.pretrain JOB.json OUTPUT_DIRECTORY")

    def report(done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
        print(f"step {done}/{total} loss {metrics['loss']:.4f} lr {metrics['learning_rate']:.2e}", flush=True)
        return False

    job = parse(PretrainJob, json.loads(storage.read_bytes(arguments[0])), arguments[0])
    workers = Workers.here(report)
    directory = storage.absolute(arguments[1], ".")
    tracked = workers.on_first(lambda: Tracked(report, job.track, directory, "pretrain"))
    workers.report = tracked or report
    result = run(job, directory, workers)
    if tracked is not None:
        tracked.close("FINISHED")
    if workers.first:
        print(json.dumps({key: value for key, value in result.items() if key != "curve"}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
