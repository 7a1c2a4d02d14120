"""What SFT and DPO share: inputs and their mixture, LoRA, the plan of samples, checkpoints, and the merged export.

Both stand on TRL's trainers. Every worker is given the same map-style dataset and the same order of rows; the trainer's
own distributed batches then make global batch t exactly the rows t*B .. t*B+B-1 of that order, on any number of workers
that divides B. Nothing is split before it is given to the trainer (data split twice is lost silently).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from peft import PeftModel
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import GenerationConfig, PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME

from cluster import storage
from operators import shards
from operators.tokens import holdout
from train import adapters, artifacts, checkpoint, models, samples, sharding
from train.errors import JobCancelled, NonFiniteLoss
from train.lora import adapter_config as adapter_config
from train.mixture import Mixture
from train.parallel import Workers
from train.settings import RowsInput
from train.settings_finetune import FinetuneJob

J = TypeVar("J", bound=FinetuneJob)
HELD_OUT_LOSS = "held_out_loss"

Penalty = Callable[[Mapping[str, torch.nn.Parameter]], torch.Tensor]
"""A term of the loss that depends on the weights alone, such as EWC's: called once per optimizer step with the trained
parameters by name, after the backward pass of the last micro batch and before clipping. It adds its gradient to each
`parameter.grad` (which may be None) and returns its value, a scalar that is the same on every worker. Gradients are those
of the mean over all workers by then, so nothing is scaled by their number. Under FSDP2 parameters and gradients are
DTensors cut along the first dimension: work on `layout.held(...)` and sum the value over workers."""


@dataclass
class Examples:
    """The encoded rows of all inputs, memory-mapped: table, ids an input, and what was set aside."""

    table: pa.Table  # rows of all inputs, one after another
    ids: list[pa.Array]  # of each input
    tokens: list[np.ndarray]  # tokens with loss, of each input's rows
    set_aside: dict[str, int]
    held_out: pa.Table | None = None  # encoded alike, never trained on

    @property
    def offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([len(part) for part in self.ids])])

    def mixture(self, job: FinetuneJob) -> Mixture:
        """The endless stream of samples over these rows."""
        weights = [item.weight for item in job.inputs]
        names = [item.name for item in job.inputs]
        sizes = [len(part) for part in self.ids]
        if job.mix_by == "tokens" and all(sizes):
            weights = [weight / float(part.mean()) for weight, part in zip(weights, self.tokens, strict=True)]
        return Mixture(sizes, weights, job.seed, names)


def rows_of(directories: Sequence[str], columns: Sequence[str], limit: int | None = None) -> Iterator[pa.RecordBatch]:
    """The surviving rows of finished stages in order, batch by batch."""
    given = 0
    for part in shards.parts(directories):
        for _, batch in shards.read(part, columns, batch_rows=1024):
            if limit is not None and given + batch.num_rows > limit:
                batch = batch.slice(0, limit - given)
            if batch.num_rows:
                yield batch
            given += batch.num_rows
            if limit is not None and given >= limit:
                return


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> str:
    """A regular expression for the text of any special token."""
    return "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)


def without_control_tokens(
    batch: pa.RecordBatch, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, aside: Counter[str]
) -> pa.RecordBatch:
    """The rows none of whose messages contains the text of a special token, which would be read as control; others are counted."""
    pattern = control_pattern(tokenizer)
    keep = np.ones(batch.num_rows, bool)
    for column in columns:
        values = batch[column]
        contents = pc.struct_field(pc.list_flatten(values), "content")
        found = pc.fill_null(pc.match_substring_regex(contents, pattern), False)
        rows = pc.list_parent_indices(values).filter(found)
        keep[rows.to_numpy(zero_copy_only=False)] = False
    if keep.all():
        return batch
    aside["special_token_in_text"] += int((~keep).sum())
    return batch.filter(pa.array(keep))


def held_out(item: RowsInput, ids: pa.Array | Sequence[str], seed: int, share: float = 0.0) -> np.ndarray:
    """bool[rows]: the rows of an input that are not trained on: `share` of all inputs, or the input's own where that is more."""
    return holdout.is_held_out(ids, seed, max(share, item.held_out))


def kept_shares(job: FinetuneJob) -> dict[str, float]:
    """The share of each input that is not trained on, where there is any."""
    share = float(getattr(job, "held_out", 0.0))
    return {item.name: max(share, item.held_out) for item in job.inputs if max(share, item.held_out)}


class ArrowSpool:
    """Collects encoded rows in an Arrow file in the temporary directory, then reads it memory-mapped.

    Every worker encodes for itself, so that workers on different machines need no shared scratch; memory is bounded by
    a batch. The file is unlinked as soon as it is mapped.
    """

    def __init__(self, schema: pa.Schema) -> None:
        descriptor, self._path = tempfile.mkstemp(prefix="danlu-", suffix=".arrow")
        os.close(descriptor)
        self._writer = pa.ipc.new_stream(self._path, schema)
        self.schema = schema

    def write(self, columns: dict[str, Any]) -> None:
        self._writer.write_table(pa.table(columns, schema=self.schema))

    def finish(self) -> pa.Table:
        self._writer.close()
        with pa.memory_map(self._path) as mapped:
            table = pa.ipc.open_stream(mapped).read_all()
        os.unlink(self._path)
        return table


def dataset(examples: Examples) -> Dataset:
    """The map-style dataset that trainers insist on, over the same memory-mapped rows."""
    # With a fingerprint given, datasets does not pickle the table to hash it.
    return Dataset(InMemoryTable(examples.table), fingerprint=uuid.uuid4().hex)


class PlannedSampler(Sampler[int]):
    """Row numbers of a training dataset in the planned order."""

    def __init__(self, order: np.ndarray) -> None:
        self._order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self._order.tolist())

    def __len__(self) -> int:
        return len(self._order)


def settled(job: J, examples: Examples) -> J:
    """The job with its steps fixed, now that its examples are counted.

    An epoch is one pass over the input with the largest share of samples (the first such); the last batch is filled from
    the next pass. Raises ValueError for an input without an example.
    """
    steps = job.steps
    if steps is None:
        mixture = examples.mixture(job)
        main = int(np.argmax(mixture.shares))
        one = float(mixture.sizes[main] / mixture.shares[main] / job.batch_examples)
        steps = max(1, math.ceil(float(job.epochs or 0) * one - 1e-9))
    return job.model_copy(update={"steps": min(steps, job.most_steps or steps), "epochs": None})


def planned_order(examples: Examples, mixture: Mixture, job: FinetuneJob) -> np.ndarray:
    """int64[steps * batch]: the dataset row at each position."""
    draw = mixture.locate(np.arange(job.planned_steps * job.batch_examples))
    return draw.row + examples.offsets[draw.source]


def plan(job: FinetuneJob, examples: Examples, mixture: Mixture) -> dict[str, Any]:
    """What a settled job will do: steps, epochs, examples, samples and tokens with loss, in all and of each input."""
    draw = mixture.locate(np.arange(job.planned_steps * job.batch_examples))
    tokens = np.concatenate(examples.tokens)[draw.row + examples.offsets[draw.source]]
    parts: dict[str, dict[str, Any]] = samples.shares(mixture.names, draw.source, tokens)
    for name, size in zip(mixture.names, mixture.sizes.tolist(), strict=True):
        parts[name] |= {"examples": size, "epochs": round(parts[name]["samples"] / size, 4)}
    return {
        "steps": job.planned_steps,
        "epochs": parts[mixture.names[int(np.argmax(mixture.shares))]]["epochs"],
        "examples": sum(len(part) for part in examples.ids),
        "samples": len(tokens),
        "tokens": int(tokens.sum()),
        "mixture": parts,
    }


def announcement(job: FinetuneJob, planned: dict[str, Any]) -> str:
    """The plan in one line, told before the first step."""
    parts = ", ".join(f"{name} {part['samples']} ({part['epochs']:g} epochs)" for name, part in planned["mixture"].items())
    return (
        f"{planned['steps']} steps of {job.batch_examples} = {planned['epochs']:g} epochs: {planned['samples']} samples of "
        f"{planned['examples']} examples, {planned['tokens']} tokens with loss; {parts}"
    )


class PlannedTrainer:
    """Mixed into a TRL trainer: takes rows in the planned order, decays by Schedule, never draws a model card.

    `penalties` are terms that depend on the weights alone; their values join the curve under their names.
    """

    order: np.ndarray
    job: FinetuneJob
    workers: Workers
    root: str
    penalties: Mapping[str, Penalty] = {}
    _penalty_values: Mapping[str, torch.Tensor] = {}
    writer: checkpoint.Writer | None = None  # made with the first checkpoint, when the model is as it will be trained

    def _prepare_for_training(self, *arguments: Any, **named: Any) -> Any:
        """Cuts the model first, where that is asked for: the optimizer is made of what it holds then."""
        trainer: Any = self
        if self.job.sharding == "fsdp2" and self.workers.world > 1:
            sharding.shard(trainer.model, self.workers)
            trainer.is_distributed_loading_by_transformers = True  # "the model owns its placement": no DDP around it
        return super()._prepare_for_training(*arguments, **named)  # type: ignore[misc]

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        """After each step: the checkpoint of an earlier one, which was written meanwhile, comes into force."""
        if self.writer is not None:
            self.writer.finish()
        super()._maybe_log_save_evaluate(*arguments, **named)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Checkpoints as pretraining writes them (`train.checkpoint`), of what is trained; frozen weights are the base's."""
        trainer: Any = self
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        self._start(optimizer, dataclasses.asdict(trainer.state), checkpoint.generators(self.workers.device))

    def _start(
        self,
        optimizer: torch.optim.Optimizer | None,
        state: dict[str, Any],
        generators: Mapping[str, torch.Tensor],
        name: str | None = None,
    ) -> checkpoint.Writer:
        """Begin to write a checkpoint. All workers take part."""
        trainer: Any = self
        parameters = sharding.trained(trainer.model)
        if self.writer is None:
            self.writer = checkpoint.Writer(self.root, parameters, self.workers, state_file=TRAINER_STATE_NAME)
        self.writer.start(trainer.state.global_step, checkpoint.slots(parameters, optimizer), state, generators, name)
        return self.writer

    def keep_best(self, step: int) -> None:
        """Keep the weights as they are, those of this step's evaluation, and of no other."""
        self._start(None, {}, {}, f"best-{step}").finish()

        def prune() -> None:
            for path in storage.list_directories(self.root):
                if re.fullmatch(r"best-\d+", path.rpartition("/")[2]) and not path.endswith(f"/best-{step}"):
                    storage.delete(path)

        self.workers.on_first(prune)

    def _read(self, directory: str, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
        """Load weights and, where given, an optimizer; the state that lies beside them."""
        trainer: Any = self

        def read() -> dict[str, Any]:
            with closing(checkpoint.Reader(directory, TRAINER_STATE_NAME)) as reader:
                reader.load(sharding.trained(trainer.model), optimizer)
                return reader.state

        return self.workers.together(read)

    def recall_best(self, step: int) -> None:
        """Take up the weights that `keep_best` kept."""
        self._read(storage.join(self.root, f"best-{step}"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights are read with the optimizer's state, once the model is as it will be trained."""

    def _load_optimizer_and_scheduler(self, directory: str | None) -> None:
        if directory is None:
            return
        trainer: Any = self
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        step = int(self._read(directory, optimizer)["global_step"])
        trainer.lr_scheduler.last_epoch = step
        for group, rate in zip(optimizer.param_groups, trainer.lr_scheduler.base_lrs, strict=True):
            group["lr"] = rate * self.job.schedule.factor(step, self.job.planned_steps)
        trainer.lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the next step is logged with

    def _load_rng_state(self, directory: str | None) -> None:
        if directory is not None:
            with closing(checkpoint.Reader(directory, TRAINER_STATE_NAME)) as reader:
                checkpoint.set_generators(reader.random_states(self.workers.rank), self.workers.device)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        trainer: Any = self
        if self.penalties:
            parameters = sharding.trained(trainer.accelerator.unwrap_model(model))
            self._penalty_values = {name: penalty(parameters) for name, penalty in self.penalties.items()}
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        if "loss" in logs:
            logs.update({name: float(value) for name, value in self._penalty_values.items()})
        super().log(logs, *arguments, **named)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return PlannedSampler(self.order)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        trainer: Any = self
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or trainer.optimizer, lambda step: self.job.schedule.factor(step, self.job.planned_steps)
        )
        return trainer.lr_scheduler

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Model cards are for hubs; a run is described by its manifest."""

    def announcement(self, planned: dict[str, Any]) -> str:
        """What is told before the first step."""
        return announcement(self.job, planned)

    def finale(self) -> dict[str, Any]:
        """Called by all workers after the last step, before the export: what else belongs in the result."""
        return {}

    def write_rows(self, directory: str, taken: Iterator[pa.Table]) -> None:
        """Commit the stage's rows, on the first worker: the samples that were `taken`, in order."""
        samples.write(directory, taken)


class Follow(TrainerCallback):
    """Reports each step, collects the curve, and stops where all workers agree to: because the user asked, or early.

    A point with `held_out_loss` is an evaluation: the best one's weights are kept in `root`/best-STEP, and with `patience`
    training stops after so many evaluations without a better one.
    """

    def __init__(self, workers: Workers, job: FinetuneJob, root: str, keys: dict[str, str], examples: Examples) -> None:
        self.workers, self.job, self.root, self.keys, self.examples = workers, job, root, keys, examples
        self.curve: list[dict[str, Any]] = []
        self.penalties: tuple[str, ...] = ()
        self.patience: int | None = getattr(job, "patience", None)
        self.keep: Callable[[int], None] = lambda step: None
        self.best: dict[str, Any] | None = None
        self.worse = 0  # evaluations since the best one
        self.stopped = False
        self.seconds = 0.0
        self._started = 0.0
        self._mixture = examples.mixture(job)
        self._given = samples.Given(self._mixture.names)

    @property
    def exhausted(self) -> bool:
        """True when training is to stop early."""
        return self.patience is not None and self.worse >= self.patience

    def recall(self, log: Sequence[dict[str, Any]]) -> None:
        """Take up the curve and the evaluations of a run that goes on."""
        self.curve = [point for point in map(self._point, log) if point is not None]
        self.best, self.worse = None, 0
        for point in self.curve:
            self._judge(point)

    def _judge(self, point: dict[str, Any]) -> bool:
        """Count an evaluation; True when it is the best so far."""
        if HELD_OUT_LOSS not in point:
            return False
        better = self.best is None or point[HELD_OUT_LOSS] < self.best[HELD_OUT_LOSS]
        if better:
            self.best = point
        self.worse = 0 if better else self.worse + 1
        return better

    def _beside(self, state: TrainerState) -> dict[str, Any]:
        """What is worth a curve and is no result: tokens with loss, and the mixture so far."""
        size = self.job.batch_examples
        draw = self._mixture.locate(np.arange((state.global_step - 1) * size, state.global_step * size))
        tokens = np.array([self.examples.tokens[s][r] for s, r in zip(draw.source.tolist(), draw.row.tolist(), strict=True)])
        return self._given.add(draw.source, tokens)

    def announce(self, note: str, done: int) -> None:
        """Tell what is about to be done. Raises JobCancelled when the user has asked to stop already."""
        if self.workers.stop_requested(done, self.job.planned_steps, note, {}):
            raise JobCancelled(f"stopped before step {done + 1}")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.recall(state.log_history)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        point = self._point(state.log_history[-1]) if state.log_history else None
        if point is None or (self.curve and self.curve[-1]["step"] >= point["step"]):
            return
        self.curve.append(point)
        if not all(math.isfinite(point[key]) for key in ("loss", "gradient_norm") if key in point):
            raise NonFiniteLoss(
                f"step {state.global_step - 1}: the loss is {point['loss']} and the norm of the gradient "
                f"{point.get('gradient_norm')}, batch of examples {self._batch(state.global_step - 1)}; learning rate "
                f"{point['learning_rate']:.3g}. Lower the learning rate or look at these examples; the last checkpoint is "
                f"in {self.root}"
            )
        if self._judge(point):
            self.keep(point["step"])
        if self.exhausted:
            control.should_training_stop = True
        if self.workers.stop_requested(state.global_step, self.job.planned_steps, "steps", {**point, **self._beside(state)}):
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def _batch(self, step: int) -> str:
        mixture, size = self.examples.mixture(self.job), self.job.batch_examples
        draw = mixture.locate(np.arange(step * size, (step + 1) * size))
        return ", ".join(
            f"{mixture.names[s]}[{self.examples.ids[s][r]}]" for s, r in zip(draw.source.tolist(), draw.row.tolist(), strict=True)
        )

    def _point(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        if "loss" not in entry:
            return None
        point = {"step": int(entry["step"]), "loss": entry["loss"], "learning_rate": entry["learning_rate"]}
        point.update({name: entry[key] for key, name in self.keys.items() if key in entry})
        point.update({name: entry[name] for name in (*self.penalties, HELD_OUT_LOSS) if name in entry})
        return point

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._started


def arguments(job: FinetuneJob, workers: Workers, output: str) -> dict[str, Any]:
    """The settings that all trainers are given; `output` is scratch. Raises ValueError when the batch does not divide."""
    if job.sharding == "none" and workers.world > 1:
        raise ValueError(f"sharding: none insists on one worker, and there are {workers.world}; use ddp or fsdp2")
    if job.batch_examples % workers.world:
        raise ValueError(f"a global batch of {job.batch_examples} examples does not divide among {workers.world} workers")
    share = job.batch_examples // workers.world
    micro = min(share, job.micro_batch_examples or share)
    if share % micro:
        raise ValueError(f"micro_batch_examples {micro} does not divide the {share} examples of a worker")
    cuda = workers.device.type == "cuda"
    return {
        "output_dir": output,
        "max_steps": job.planned_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "learning_rate": job.learning_rate,
        "weight_decay": job.weight_decay,
        "max_grad_norm": job.clip,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": min(job.checkpoint_every, job.planned_steps),
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "use_cpu": not cuda,
        "bf16": job.precision == "bf16",
        "fp16": False,
        "gradient_checkpointing": job.activation_checkpointing,
        "dataloader_pin_memory": cuda,
        "dataloader_drop_last": False,
        "max_length": job.max_length,
        "seed": job.seed,
        "data_seed": job.seed,
        "ddp_find_unused_parameters": False,
    }


def finished(directory: str, root: str, workers: Workers) -> dict[str, Any] | None:
    """The result on file of a run that ended before, for every worker; its checkpoints below `root` are not needed then."""
    result = workers.share(samples.read_result(directory) if workers.first else None)
    if result is not None:
        workers.on_first(lambda: storage.delete(root))
    return result


def complete(
    trainer: Any,
    follow: Follow,
    job: FinetuneJob,
    examples: Examples,
    mixture: Mixture,
    generation: GenerationConfig,
    directory: str,
    root: str,
    workers: Workers,
) -> dict[str, Any]:
    """Train in the planned order, export, write samples and result, then clear the checkpoints. Raises as `train` does."""
    trainer.job, trainer.order = job, planned_order(examples, mixture, job)
    trainer.workers, trainer.root = workers, root
    follow.penalties = tuple(trainer.penalties)
    follow.keep = trainer.keep_best
    compared = _compared(trainer, job, directory, workers)
    train(trainer, follow, root, workers, trainer.announcement(plan(job, examples, mixture)))
    if follow.best is not None:
        trainer.recall_best(follow.best["step"])
    more = trainer.finale()
    if compared is not None:
        more["evaluation"] = compared()
    sharding.gather(trainer.model, keep=workers.first)
    # What was learned after an early stop is nothing: the job is as long as it was.
    done = job.model_copy(update={"steps": follow.curve[-1]["step"]}) if follow.exhausted else job

    def write() -> dict[str, Any]:
        result = {**outcome(done, examples, mixture, follow, trainer.model, workers), **more}
        export(trainer.model, trainer.processing_class, directory, generation, job.model)
        trainer.write_rows(directory, samples.finetuning(mixture, examples.ids, done.planned_steps, job.batch_examples))
        return samples.write_result(directory, result)

    result = workers.on_first(write)
    workers.on_first(lambda: storage.delete(root))
    return dict(workers.share(result))


def _compared(trainer: Any, job: FinetuneJob, directory: str, workers: Workers) -> Callable[[], dict[str, Any]] | None:
    """Score the model as it is, if that is asked for; what is returned scores it again and tells what was gained and lost."""
    if job.comparison is None:
        return None
    from train.comparison import Compared, scorer  # which encodes rows as the trainers of this package do

    config, tokenizer = trainer.model.config, trainer.processing_class
    length = int(config.get_text_config().max_position_embeddings)
    identity = {"precision": job.precision, "quantize": job.lora.quantize if job.lora is not None else "none"}
    compared = Compared(job.comparison, job.model, job.seed, directory, workers, identity)
    compared.before(lambda: scorer(trainer.model, workers, job.precision, bare=True), tokenizer, length)
    return lambda: compared.after(scorer(trainer.model, workers, job.precision), tokenizer, length)


def train(trainer: Any, follow: Follow, root: str, workers: Workers, note: str) -> None:
    """Tell the plan (`note`), then run a TRL trainer from its newest whole checkpoint to the end.

    Raises JobCancelled when the user stopped it.
    """
    trainer.remove_callback(PrinterCallback)
    found = workers.together(lambda: checkpoint.latest(root))
    step = workers.share(found[0] if found else None)
    if step is None:
        found = None
    elif found is None or found[0] != step:
        raise ValueError(f"the checkpoint of step {step} in {root} is not seen by every worker: put the run where all see it")
    follow.announce(note, step or 0)
    if found is not None:
        follow.recall(json.loads((found[1] / TRAINER_STATE_NAME).read_text("utf-8"))["log_history"])
    if not follow.exhausted:  # else it was stopped early and ended before its export was written
        try:
            trainer.train(resume_from_checkpoint=None if found is None else str(found[1]))
            if trainer.writer is not None:
                trainer.writer.finish()
        finally:
            if trainer.writer is not None:
                trainer.writer.close()
    if follow.stopped:
        raise JobCancelled(f"stopped after step {trainer.state.global_step}; the checkpoint is in {root}")


def output_directory(root: str) -> str:
    """A directory for the trainer, which insists on one and leaves nothing there: checkpoints are written to `root`."""
    return os.path.join(tempfile.gettempdir(), "danlu-trainer")


def export(
    trained: Any, tokenizer: PreTrainedTokenizerBase, directory: str, generation: GenerationConfig, base: str | None = None
) -> None:
    """Write `directory`/model and, for adapters, `directory`/adapter: the model is the base with the adapter merged in.

    An adapter on a 4-bit base is merged into the model at `base`, loaded again: a sum in 4 bits would be another model.
    """
    if isinstance(trained, PeftModel):
        quantized = getattr(trained.get_base_model(), "is_quantized", False)
        with artifacts.building(storage.join(directory, "adapter")) as local:
            trained.save_pretrained(str(local), save_embedding_layers=False)
            (local / "README.md").unlink(missing_ok=True)  # a card for a hub
        if quantized:
            if base is None:
                raise ValueError("an adapter on a quantised base is merged into the base as it was; its path is not given")
            trained = adapters.attach(models.load(base), artifacts.local_directory(storage.join(directory, "adapter")))
        trained = adapters.merge(trained)
    trained.config.use_cache = True
    trained.generation_config = generation
    models.export(trained, tokenizer, storage.join(directory, "model"))


def outcome(
    job: FinetuneJob, examples: Examples, mixture: Mixture, follow: Follow, trained: Any, workers: Workers
) -> dict[str, Any]:
    """The result of a finished job."""
    planned = plan(job, examples, mixture)
    parameters, trainable = models.parameter_counts(trained)
    done = len(follow.curve) or 1
    return {
        **planned,
        "curve": samples.thinned(follow.curve),
        "parameters": parameters,
        "trainable_parameters": trainable,
        "set_aside": examples.set_aside,
        **({"held_out_shares": shares} if (shares := kept_shares(job)) else {}),
        **({"best": follow.best, "stopped_early": follow.exhausted} if follow.best is not None else {}),
        "timings": {
            "step_seconds": follow.seconds,
            "tokens_per_second": planned["tokens"] * (done / job.planned_steps) / follow.seconds if follow.seconds else 0.0,
            "workers": workers.world,
            "device": workers.device.type,
        },
    }
