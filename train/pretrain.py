"""Pretraining: a short loop over packed sequences, exact to the sample, the same under every parallel layout.

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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig
from transformers.modeling_utils import PreTrainedModel

from cluster import storage
from operators import shards
from operators.config import parse
from train import adapters, checkpoint, embeddings, ewc, flops, layout, models, samples
from train.errors import JobCancelled, NonFiniteLoss
from train.layout import Layout, Penalty
from train.loader import IGNORE, Batch, PackedTokens, TokenLoader, micro_batches, rank_positions, tokenizer_file
from train.objective import PackedLoss, prepare
from train.parallel import Workers
from train.scoring import Row
from train.settings import PretrainJob
from train.tracking import Tracked

if TYPE_CHECKING:
    from train.comparison import Score

_CURVE_POINTS = 5000
_NAMED_ROWS, _NAMED_DOCUMENTS = 32, 3


def run(job: PretrainJob, directory: str, workers: Workers) -> dict[str, Any]:
    """Train and export to `directory`/model; write `directory`/parts (which sample was taken in which step).

    Returns {"curve", "parameters", "trainable_parameters", "steps", "tokens", "samples", "mixture", "timings"}. Called
    again after a crash it goes on from the last checkpoint, also with other workers or another layout; called again when
    finished it returns the result on file. Raises ValueError for a layout that does not fit, naming those that do,
    NonFiniteLoss naming the batch, JobCancelled when the user stopped.
    """
    root = storage.join(directory, "checkpoints")
    finished = workers.share(samples.read_result(directory) if workers.first else None)
    if finished is not None:
        workers.on_first(lambda: storage.delete(root))
        return finished
    layout.choose(job, workers)
    if job.compile:
        layout.check_compiler(workers.device)
    loader, tokenizer = workers.together(lambda: _open(job))
    config = workers.together(lambda: _configuration(job, loader, tokenizer))
    place = layout.set_up(layout.choose(job, workers, config))
    resumes = bool(workers.share(workers.on_first(lambda: checkpoint.newest(root) is not None)))
    objective = _placed(job, loader, tokenizer, place, resumes)
    compared = _compared(job, directory, place, objective, tokenizer, loader.length, resumes and place.cut)
    training = _Training(job, root, place, loader, objective)
    try:
        training.resume()
        training.train()
    finally:
        training.close()
    evaluation = {"evaluation": compared()} if compared is not None else {}
    model = layout.gathered(objective.network, place)

    def write() -> dict[str, Any]:
        assert model is not None
        models.export(model, tokenizer, storage.join(directory, "model"))
        samples.write(directory, samples.pretraining(loader, training.steps, job.batch_sequences))
        return samples.write_result(directory, {**training.result(), **evaluation})

    result = workers.share(workers.on_first(write))
    workers.on_first(lambda: storage.delete(root))
    return result


def _open(job: PretrainJob) -> tuple[TokenLoader, Any]:
    corpora = [PackedTokens(item.directory) for item in job.inputs]
    loader = TokenLoader(corpora, [item.weight for item in job.inputs], job.seed, [item.name for item in job.inputs])
    return loader, models.wrap_tokenizer(tokenizer_file(job.inputs[0].directory))


def _configuration(job: PretrainJob, loader: TokenLoader, tokenizer: Any) -> Any:
    """The model's configuration, before its weights exist."""
    vocab = loader.corpora[0].vocab_size
    if not isinstance(job.model, str):
        eos = loader.corpora[0].index.get("eos_token_id")
        return models.configuration(job.model, vocab, loader.length, eos, tokenizer.pad_token_id)
    found = adapters.find(job.model)
    directory = models.model_directory(job.model if found is None or found.inside else found.base)
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    tokenizers = _tokenizers(job)
    # The corpus' tokenizer may have more tokens than the model: `_model` makes their rows, here is their number.
    config.vocab_size = max(config.vocab_size, embeddings.rows(*tokenizers) if tokenizers else 0)
    if config.vocab_size < vocab:
        raise ValueError(
            f"the model at {job.model} knows {config.vocab_size} tokens, the packed corpus was made with {vocab}: pack with the "
            "model's own tokenizer"
        )
    return config


def _tokenizers(job: PretrainJob) -> tuple[bytes, bytes] | None:
    """The contents of tokenizer.json of the model and of the corpus; None for a model without that file."""
    own = models.tokenizer_json(str(job.model))
    return None if own is None else (own, tokenizer_file(job.inputs[0].directory).read_bytes())


def _model(job: PretrainJob, loader: TokenLoader, tokenizer: Any) -> PreTrainedModel:
    if isinstance(job.model, str):
        model = models.load(job.model)
        if tokenizers := _tokenizers(job):
            embeddings.extend(model, *tokenizers)
    else:
        model = models.create(_configuration(job, loader, tokenizer), job.seed)
    return model


def _placed(job: PretrainJob, loader: TokenLoader, tokenizer: Any, place: Layout, resumes: bool) -> PackedLoss:
    """The model and its loss, lying over the workers as the layout says; a cut model that `resumes` is given no weights."""
    workers = place.workers

    def objective(network: PreTrainedModel) -> PackedLoss:
        layout.checkpoint_activations(network, job.activation_checkpointing)
        if job.compile:
            layout.compile_blocks(network)
        return PackedLoss(network, z_loss=job.z_loss, chunk_tokens=job.loss_chunk_tokens)

    if not place.cut:
        made = workers.together(lambda: objective(_model(job, loader, tokenizer)))
        return made.to(workers.device)
    # Only the first worker ever holds a whole model, on its host.
    source = workers.on_first(lambda: _model(job, loader, tokenizer))
    config = workers.share(source.config if source is not None else None)
    cut = workers.together(lambda: objective(layout.skeleton(config)))
    layout.cut(cut, place, job.precision)
    if not resumes:
        layout.fill(cut.network, source, place)
    layout.fill_buffers(cut.network, source, place)
    if source is not None:
        cut.network.generation_config = source.generation_config
    return cut


def _compared(
    job: PretrainJob, directory: str, place: Layout, objective: PackedLoss, tokenizer: Any, length: int, empty: bool
) -> Callable[[], dict[str, Any]] | None:
    """Score the model as it is, if that is asked for; what is returned scores it again and tells what was gained and lost.

    An `empty` network was given no weights, because it takes a checkpoint's: its scores before must be on file.
    """
    if job.comparison is None:
        return None
    # Which encodes rows as fine-tuning does: TRL's imports take seconds.
    from train.comparison import Compared, scorer

    if not isinstance(job.model, str):
        raise ValueError("a model from scratch has no scores before; leave `comparison` out")
    workers = place.workers
    most = min(length, int(objective.network.config.max_position_embeddings))
    compared = Compared(job.comparison, job.model, job.seed, directory, workers, {"precision": job.precision, "packed": True})
    found = workers.together(lambda: _tokenizers(job))
    if found is not None and embeddings.pieces(*found):
        # The rows that were added to the embedding are no part of the model before, which is asked in its own tokens.
        own = workers.together(lambda: models.load_tokenizer(str(job.model)))
        compared.cut(own, min(most, job.comparison.length))

        def before() -> Score:
            model: Any = workers.together(lambda: models.load(str(job.model)))
            return scorer(model.to(workers.device), workers, job.precision)

        compared.before(before, own, most)
    else:

        def now() -> Score:
            if empty:
                raise ValueError(f"{directory}/evaluation/before.json is not there or of other sets, and training has begun")
            return _scorer(job, place, objective, length)

        compared.before(now, tokenizer, most)
    return lambda: compared.after(_scorer(job, place, objective, length), tokenizer, most)


def _scorer(job: PretrainJob, place: Layout, objective: PackedLoss, length: int) -> Score:
    """Log-probabilities by the model as it lies over the workers, one row a pass."""
    workers = place.workers
    device = workers.device
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32

    def score(rows: Sequence[Row]) -> np.ndarray:
        found = torch.zeros(len(rows), dtype=torch.float64, device=device)
        training = objective.training
        objective.eval()
        # All workers call a cut model alike: one without a row of its own does the last one again.
        for number in range(-(-len(rows) // place.data)):
            index = number * place.data + place.data_rank
            batch = single(rows[min(index, len(rows) - 1)], length if job.compile or device.type == "cuda" else None)
            with torch.no_grad(), layout.autocast(place, job.precision):
                _, parts = objective(**prepare(batch, slice(0, 1), device, dtype))
            if index < len(rows):
                found[index] = -parts["cross_entropy"].double()
        objective.train(training)
        layout.reshard(objective)
        return np.asarray((workers.sum(found) / place.tensor).cpu().numpy())

    return score


def single(row: Row, width: int | None) -> Batch:
    """A packed row of one document, its labels where it is scored; padded to `width` (a compiled model is asked of one shape)."""
    size = max(len(row.ids), width or 0)
    ids, positions, labels = np.zeros((3, 1, size), np.int32)
    count = len(row.ids)
    ids[0, :count], positions[0, :count] = row.ids, np.arange(count)
    positions[0, count:] = np.arange(size - count)
    labels[:] = IGNORE
    labels[0, : count - 1] = np.where(row.scored[1:], row.ids[1:], IGNORE)
    return Batch(ids, positions, labels, row.count)


class _Training:
    """The loop's state: model, optimizer, how many steps and tokens are done, and the curve so far.

    `penalties` are terms that depend on the weights alone, by name; their values join the curve.
    """

    def __init__(self, job: PretrainJob, root: str, place: Layout, loader: TokenLoader, objective: PackedLoss) -> None:
        self.job, self.root, self.place, self.workers, self.loader = job, root, place, place.workers, loader
        self.objective = objective
        self.steps = min(job.planned_steps(loader.length), job.most_steps or sys.maxsize)
        self.parameters = dict(objective.network.named_parameters())
        self.penalties: dict[str, Penalty] = {}
        if job.ewc:
            self.penalties["ewc_penalty"] = ewc.Ewc(job.ewc, str(job.model), objective.network, self.workers)
        # Weights of inputs multiply a token's loss; the sum is still divided by the number of tokens, so that the weight of
        # one input leaves what the others count as it is.
        weights = np.array([item.loss_weight for item in job.inputs], np.float32)
        self.loss_weights = None if (weights == 1).all() else weights
        self.optimizer = torch.optim.AdamW(
            layout.parameter_groups(self.parameters, job.weight_decay), lr=job.learning_rate, betas=job.betas, fused=True
        )
        self.writer = checkpoint.Writer(root, self.parameters, self.workers, job.keep_checkpoints)
        self.network = layout.wrapped(objective, place)
        self.dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
        self.step = self.tokens = 0
        self.curve: list[dict[str, Any]] = []
        self.every = 1  # steps between points of the curve
        self.seconds = 0.0
        self.timed_tokens = 0
        self.given = samples.Given(loader.names)
        self.token_flops = flops.flops_per_token(objective.network, loader.length)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[dict[str, Any]]]] | None = None
        torch.manual_seed(job.seed * 1_000_003 + self.workers.rank)

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one. All workers take part, and must see the same one."""
        found = self.workers.together(lambda: checkpoint.newest(self.root))
        step = self.workers.share(found[0] if found else None)
        if step is None:
            return
        self.workers.together(lambda: self._load(step))

    def _load(self, step: int) -> None:
        found = checkpoint.newest(self.root)
        if found is None or found[0] != step:
            raise ValueError(
                f"the checkpoint of step {step} in {self.root} is not seen by every worker: put the run where all see it"
            )
        reader = checkpoint.Reader(found[1])
        state = reader.state
        if state["batch_sequences"] != self.job.batch_sequences:
            raise ValueError(f"{found[1]} was written with batches of {state['batch_sequences']} sequences")
        position = self.loader.resume(state["loader"])
        if position != step * self.job.batch_sequences:
            raise ValueError(f"{found[1]} stands at sample {position}, which is not the start of step {step}")
        reader.load(self.parameters, self.optimizer)
        checkpoint.set_generators(reader.random_states(self.workers.rank), self.workers.device)
        reader.close()
        self.step, self.tokens = step, int(state["loader"]["tokens"])
        self.curve, self.every = state["curve"], int(state["curve_every"])

    def train(self) -> None:
        """All remaining steps."""
        job, workers = self.job, self.workers
        self.network.train()
        if workers.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(workers.device)  # a warm group has done other jobs before
        while self.step < self.steps:
            started = time.perf_counter()
            point = self._step(job.learning_rate * job.schedule.factor(self.step, self.steps))
            self.step += 1
            self.seconds += time.perf_counter() - started
            self._note(point)
            stop = workers.stop_requested(self.step, self.steps, "steps", {**point, **self._beside(time.perf_counter() - started)})
            if self.step < self.steps and (stop or self.step % job.checkpoint_every == 0):
                self._save()
            if stop:
                self.writer.finish()
                raise JobCancelled(f"stopped after step {self.step} of {self.steps}; the checkpoint is in {self.root}")
        self.writer.finish()

    def _beside(self, seconds: float) -> dict[str, Any]:
        """What is worth a curve and is no result: the mixture so far, speed, and the share of the devices' peak."""
        if not self.workers.first:
            return {}
        positions = np.arange((self.step - 1) * self.job.batch_sequences, self.step * self.job.batch_sequences)
        tokens = self.loader.valid_tokens(positions)
        found = self.given.add(self.loader.locate(positions).source, tokens)
        found["tokens_per_second"] = round(float(tokens.sum()) / seconds, 3)
        if self.workers.device.type == "cuda":
            name = torch.cuda.get_device_name(self.workers.device)
            share = flops.mfu(found["tokens_per_second"], self.token_flops, name, self.workers.world)
            if share is not None:
                found["mfu"] = round(share, 4)
        return found

    def _note(self, point: dict[str, Any]) -> None:
        """Add a point to the curve, which is bounded: in a long run every second point goes, and again."""
        step = point["step"]
        if step % self.every == 0 or step in (1, self.steps):
            self.curve.append(point)
        if len(self.curve) > _CURVE_POINTS:
            self.every *= 2
            self.curve = [kept for kept in self.curve if kept["step"] % self.every == 0 or kept["step"] in (1, self.steps)]

    def close(self) -> None:
        """End the threads."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.writer.close()

    def _batch(self, step: int) -> list[dict[str, Any]]:
        """The micro batches that this worker takes in a step, as arguments of the loss."""
        positions = rank_positions(step, self.job.batch_sequences, self.place.data_rank, self.place.data)
        batch = self.loader.batch(positions)
        pieces = micro_batches(len(batch.input_ids), self.job.micro_batch_sequences)
        prepared: list[dict[str, Any]] = [prepare(batch, piece, self.workers.device, self.dtype) for piece in pieces]
        if self.loss_weights is not None:
            rows = self.loss_weights[self.loader.locate(positions).source]
            for piece, arguments in zip(pieces, prepared, strict=True):
                weights = torch.from_numpy(rows[piece]).to(self.workers.device)
                arguments["weights"] = weights[:, None].expand(-1, batch.labels.shape[1])
        return prepared

    def _taken(self) -> list[dict[str, Any]]:
        """The batch of this step; the next one is made ready in a thread meanwhile."""
        if self._next is not None and self._next[0] == self.step:
            batch = self._next[1].result()
        else:
            batch = self._batch(self.step)
        ahead = self.step + 1
        self._next = (ahead, self._thread.submit(self._batch, ahead)) if ahead < self.steps else None
        return batch

    def _step(self, rate: float) -> dict[str, Any]:
        """One optimizer step; its point of the curve."""
        job, workers, place = self.job, self.workers, self.place
        everyone = np.arange(self.step * job.batch_sequences, (self.step + 1) * job.batch_sequences)
        valid = int(self.loader.valid_tokens(everyone).sum())
        if valid == 0:
            raise ValueError(f"step {self.step}: none of its {job.batch_sequences} sequences has a token with loss")
        pieces = self._taken()
        sums = _Sums(workers.device)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with layout.autocast(place, job.precision):
                if last:
                    loss, parts = self.network(**piece)
                else:
                    with layout.accumulating(self.network):
                        loss, parts = self.network(**piece)
            # Gradients are averaged over the groups of workers; the loss is a mean over all of their tokens.
            scaled = loss * (place.data / valid)
            if last:
                scaled.backward()
            else:
                with layout.accumulating(self.network):
                    scaled.backward()
            sums.add(loss, parts)
        layout.settle_gradients(self.parameters)
        values = {name: penalty(self.parameters) for name, penalty in self.penalties.items()}
        norm = layout.global_norm(self.parameters, place)
        # One message for all: the sums, and how many workers have written their part of a checkpoint.
        total = sums.over(workers, place.tensor, float(self.writer.written))
        value = total.loss / valid
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            self.writer.finish()  # all workers come here; a checkpoint that is being written is from before
            raise NonFiniteLoss(
                f"step {self.step}: the loss is {value} and the norm of the gradient {float(norm)}, batch of sequences "
                f"{self._named(everyone)}; learning rate {rate:.3g}. Lower the learning rate, lengthen the warm-up, or look at "
                f"these sequences; the last checkpoint is in {self.root}"
            )
        factor = job.clip / (norm + 1e-6)
        if float(factor) < 1:
            layout.scale_gradients(self.parameters, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.writer.busy and total.flag >= workers.world:
            self.writer.finish()
        self.tokens += valid
        self.timed_tokens += valid
        return {
            "step": self.step + 1, "loss": round(total.parts.pop("cross_entropy") / valid, 6), "learning_rate": rate,
            "gradient_norm": round(float(norm), 6), "tokens": self.tokens,
            **{name: round(part / valid, 6) for name, part in sorted(total.parts.items())},
            **total.load,
            **{name: round(float(penalty), 6) for name, penalty in values.items()},
        }  # fmt: skip

    def _named(self, positions: np.ndarray) -> str:
        """The rows at these positions, each with the ids of the documents in it."""
        draw = self.loader.locate(positions)
        words = []
        for number, (source, row) in enumerate(zip(draw.source.tolist(), draw.row.tolist(), strict=True)):
            found = document_ids(self.loader.corpora[source].directory, row) if number < _NAMED_ROWS else []
            more = f", and {len(found) - _NAMED_DOCUMENTS} more" if len(found) > _NAMED_DOCUMENTS else ""
            ids = f" (documents {', '.join(found[:_NAMED_DOCUMENTS])}{more})" if found else ""
            words.append(f"{self.loader.names[source]}[{row}]{ids}")
        return ", ".join(words)

    def _save(self) -> None:
        state = {
            "batch_sequences": self.job.batch_sequences,
            "loader": self.loader.state(self.step * self.job.batch_sequences, self.tokens),
            "layout": str(self.place),
            "curve": list(self.curve),
            "curve_every": self.every,
        }
        tensors = checkpoint.slots(self.parameters, self.optimizer)
        self.writer.start(self.step, tensors, state, checkpoint.generators(self.workers.device))

    def result(self) -> dict[str, Any]:
        """Called when all steps are done."""
        job = self.job
        parameters, trainable = models.parameter_counts(self.objective.network)
        positions = np.arange(self.steps * job.batch_sequences)
        draw = self.loader.locate(positions)
        return {
            "curve": samples.thinned(self.curve),
            "parameters": parameters,
            "trainable_parameters": trainable,
            "steps": self.steps,
            "tokens": self.tokens,
            "samples": len(positions),
            "mixture": samples.shares(self.loader.names, draw.source, self.loader.valid_tokens(positions)),
            "timings": {
                "step_seconds": self.seconds,
                "tokens_per_second": self.timed_tokens / self.seconds if self.seconds else 0.0,
                "workers": self.workers.world,
                "layout": str(self.place),
                "device": self.workers.device.type,
                **(
                    {"peak_memory_gib": torch.cuda.max_memory_allocated(self.workers.device) / 2**30}
                    if self.workers.device.type == "cuda"
                    else {}
                ),
            },
        }


class _Sums:
    """What a step adds up over micro batches and workers: the loss, its parts, and the tokens of each expert."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._parts: dict[str, torch.Tensor] = {}
        self.loss = self.flag = 0.0
        self.parts: dict[str, float] = {}
        self.load: dict[str, float] = {}

    def add(self, loss: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        self._loss += loss.detach().double()
        for name, part in parts.items():
            value = part.detach().double()
            self._parts[name] = self._parts[name] + value if name in self._parts else value

    def over(self, workers: Workers, copies: int, flag: float) -> _Sums:
        """All workers' sums, where `copies` of them have the same; `flag` is summed over every one. Returns itself, filled."""
        names = sorted(self._parts)
        pieces = [self._loss.view(1), *(self._parts[name].reshape(-1) for name in names)]
        message = torch.cat([torch.tensor([flag], dtype=torch.float64, device=self._device), *pieces])
        values = workers.sum(message).cpu()
        self.flag = float(values[0])
        sums = values[1:] / copies
        self.loss = float(sums[0])
        at = 1
        for name in names:
            part = sums[at : at + self._parts[name].numel()].view(self._parts[name].shape)
            at += part.numel()
            if name == "expert_tokens":
                # Share of an expert over the share it would have in balance: 1 everywhere is best.
                relative = part / part.sum(dim=-1, keepdim=True).clamp(min=1) * part.shape[-1]
                self.load = {
                    "expert_load_max": round(float(relative.max()), 4),
                    "expert_load_min": round(float(relative.min()), 4),
                }
            else:
                self.parts[name] = float(part)
        return self


def document_ids(directory: str, row: int) -> list[str]:
    """The ids of the documents in one row of a pack stage, in order; none where its Parquet files are gone."""
    for part in shards.parts([directory]):
        with storage.open_input(part.path) as stream:
            file = pq.ParquetFile(stream)
            column = file.schema_arrow.get_field_index("sequence")
            for group in range(file.num_row_groups):
                statistics = file.metadata.row_group(group).column(column).statistics
                if statistics is not None and statistics.has_min_max and not statistics.min <= row <= statistics.max:
                    continue
                table = file.read_row_group(group, columns=["sequence", "documents"])
                where = np.flatnonzero(table["sequence"].to_numpy() == row)
                if where.size:
                    return list(dict.fromkeys(table["documents"][int(where[0])].as_py()))
    return []


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
    status: Literal["FINISHED", "FAILED"] = "FAILED"
    try:
        result = run(job, directory, workers)
        status = "FINISHED"
    except BaseException:
        if workers.first:
            found = checkpoint.newest(storage.join(directory, "checkpoints"))
            there = f"step {found[0]} is in {found[1]}" if found else "no step was saved yet"
            print(f"{there}; the same command goes on from there, also with other workers", file=sys.stderr, flush=True)
        raise
    finally:
        if tracked is not None:
            tracked.close(status)
    if workers.first:
        print(json.dumps({key: value for key, value in result.items() if key != "curve"}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
