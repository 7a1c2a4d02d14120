"""The peer of training benchmarks: transformers.Trainer on the same packed rows, with its best ordinary settings.

Documents are isolated on its side as well: the model gets the same `position_ids`, from whose restarts transformers
builds a block-diagonal mask for SDPA (no attention mask, no cache). Labels are set one to the right, as its loss shifts them.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_utils import PreTrainedModel

from train.loader import IGNORE, TokenLoader
from train.settings import PretrainJob


class Rows(Dataset):  # type: ignore[type-arg]
    """Row i of a loader's stream, map-style: what the loop reads as position i."""

    def __init__(self, loader: TokenLoader, rows: int, isolated: bool = True) -> None:
        self.loader, self.rows, self.isolated = loader, rows, isolated

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        batch = self.loader.batch(np.array([position]))
        labels = np.full(batch.labels.shape[1], IGNORE, np.int64)
        labels[1:] = batch.labels[0, :-1]
        found = {"input_ids": batch.input_ids[0].astype(np.int64), "labels": labels}
        # without restarts there is nothing to mask: Trainer may use causal attention as its fastest kernel has it
        return {**found, "position_ids": batch.position_ids[0].astype(np.int64)} if self.isolated else found


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train(
    model: PreTrainedModel, job: PretrainJob, loader: TokenLoader, *, compiled: bool = False, checkpointing: bool = False,
    micro: int | None = None, isolated: bool = True,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """(loss of each step, time between the ends of steps in seconds: one fewer) of the job under transformers.Trainer.

    The job's schedule must be constant without warm-up. `micro` rows go through the model at a time.
    """
    assert job.schedule.shape == "constant" and job.schedule.warmup == 0, "both sides must hold the learning rate"
    assert job.steps is not None
    micro = micro or job.batch_sequences
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="danlu-hf-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, max_steps=job.steps, per_device_train_batch_size=micro,
            gradient_accumulation_steps=job.batch_sequences // micro, learning_rate=job.learning_rate,
            lr_scheduler_type="constant", weight_decay=job.weight_decay, adam_beta1=job.betas[0], adam_beta2=job.betas[1],
            max_grad_norm=job.clip, optim="adamw_torch_fused", bf16=job.precision == "bf16", use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential", remove_unused_columns=False, logging_steps=1, report_to="none",
            save_strategy="no", disable_tqdm=True, torch_compile=compiled, gradient_checkpointing=checkpointing, seed=job.seed,
        )  # fmt: skip
        model.config.use_cache = False
        rows = Rows(loader, job.steps * job.batch_sequences, isolated)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock])
        trainer.pop_callback(_printer())
        trainer.train()
    return clock.losses, np.diff(clock.ends).tolist()


def _printer() -> type[TrainerCallback]:
    from transformers import PrinterCallback

    return PrinterCallback
