"""Alignment from single replies marked good or bad: KTO (Ethayarajh et al. 2024), by TRL's trainer.

The loss compares a reply's gain over the reference with the mean gain of mismatched replies, an estimate of the KL
divergence: each prompt of a batch with the reply of the example before it. TRL pairs and averages within each forward
pass; here it is the global batch, so that how a batch is cut does not change the loss.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from cluster import storage
from train import dpo, finetune, lora, models, reference
from train.finetune import ArrowSpool, Examples, Follow, PlannedSampler, PlannedTrainer
from train.parallel import Workers
from train.settings_finetune import KtoJob

_ENCODED = pa.schema(
    [pa.field("prompt_ids", pa.list_(pa.int32())), pa.field("completion_ids", pa.list_(pa.int32())), pa.field("label", pa.bool_())]
)
_SPOOL_ROWS = 4_096


class _Trainer(PlannedTrainer, KTOTrainer):  # type: ignore[misc]
    """TRL's KTO trainer on rows that lie in the planned order, with a reference that was computed before."""

    _divergence: torch.Tensor  # mean gain of mismatched replies over the global batch of the current step

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.precompute_ref_logps = True

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """The dataset is encoded already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """The reference's log-probabilities are columns of the dataset already (`train.reference`)."""
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return PlannedSampler(np.arange(len(self.order)))

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> None:
        """Called with all passes of a step before the first of them: the estimate is of the whole batch."""
        if not self.calculate_KL:
            return
        gains = []
        for batch in batch_samples:
            moved = {key: value.to(device) for key, value in batch.items()}
            gains.append(super()._compute_kl_logps(self.model, moved) - moved["ref_KL_logps"])
        self._divergence = self.accelerator.gather(torch.cat(gains)).mean()

    def _compute_kl_logps(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        return self._divergence.expand(len(batch["label"])) if self.calculate_KL else None

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> torch.Tensor:
        if self.calculate_KL:
            inputs = {**inputs, "ref_KL_logps": torch.zeros_like(inputs["ref_KL_logps"])}  # taken off the estimate already
        loss: torch.Tensor = super()._compute_loss(model, inputs, return_outputs)
        return loss


_CURVES = {
    "grad_norm": "gradient_norm",
    "kl": "divergence",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_log_probability",
    "logps/rejected": "rejected_log_probability",
}


def run(job: KtoJob, directory: str, workers: Workers) -> dict[str, Any]:
    """Align and export to `directory`/model (adapters merged) and `directory`/adapter; otherwise as `train.dpo.run`."""
    root = storage.join(directory, "checkpoints")
    finished = finetune.finished(directory, root, workers)
    if finished is not None:
        return finished
    micro = min(job.batch_examples // workers.world, job.micro_batch_examples or job.batch_examples)
    if job.loss == "kto" and micro < 2:
        raise ValueError("kto compares with mismatched replies of the batch: at least 2 examples of each worker in a forward pass")

    def load() -> Any:
        model = lora.load_base(job.model, job.lora, workers.device)
        model.config.use_cache = False
        return model

    def prepare() -> tuple[Any, ...]:
        lora.check(job)
        model, tokenizer = load(), models.load_tokenizer(job.model)
        models.as_chat(tokenizer, model, job.chat_template)
        examples = encode(job, tokenizer)
        settled = finetune.settled(job, examples)
        mixture = examples.mixture(settled)
        return (
            model,
            tokenizer,
            examples,
            mixture,
            settled,
            in_order(settled, examples, finetune.planned_order(examples, mixture, settled)),
        )

    model, tokenizer, examples, mixture, job, laid = workers.together(prepare)
    generation = model.generation_config
    cache = job.reference_cache or storage.join(directory, "reference")
    if reference.is_cut(job, workers):
        model = None
    laid = reference.attach(job, model, load, tokenizer, laid, np.arange(laid.table.num_rows), cache, workers)
    if model is None:
        model = workers.together(load)
        model.generation_config = generation
    follow = Follow(workers, job, root, _CURVES, examples)
    trainer = _Trainer(
        model=model,
        args=KTOConfig(
            **finetune.arguments(job, workers, finetune.output_directory(root)),
            beta=job.beta,
            loss_type=job.loss,
            desirable_weight=job.desirable_weight,
            undesirable_weight=job.undesirable_weight,
            train_sampling_strategy="sequential",  # our own order, in which the rows lie
            precompute_ref_log_probs=job.lora is None,
        ),
        data_collator=DataCollatorForUnpairedPreference(pad_token_id=tokenizer.pad_token_id, max_length=job.max_length),
        train_dataset=as_dataset(job, laid),
        processing_class=tokenizer,
        callbacks=[follow],
        peft_config=lora.adapter_config(job.lora),
    )
    return finetune.complete(trainer, follow, job, examples, mixture, generation, directory, root, workers)


def encode(job: KtoJob, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Tokenise conversations that end with a reply and have a label; others are set aside and counted.

    Raises ValueError for an input without a column `label`.
    """
    spool = ArrowSpool(_ENCODED)
    ids: list[pa.Array] = []
    tokens: list[np.ndarray] = []
    aside: Counter[str] = Counter()
    for item in job.inputs:
        kept_ids: list[str] = []
        kept_tokens: list[int] = []
        try:
            for batch in finetune.rows_of([item.directory], ["id", "messages", "tools", "label"]):
                held = finetune.held_out(item, batch["id"], job.seed)
                if held.any():
                    aside["held_out"] += int(held.sum())
                    batch = batch.filter(pa.array(~held))
                clean = finetune.without_control_tokens(batch, ["messages"], tokenizer, aside)
                rows = [row for row in clean.to_pylist() if _usable(row, aside)]
                columns: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "label": []}
                prompts = [row["messages"][:-1] for row in rows]
                replies = [row["messages"][-1:] for row in rows]
                tools = [row["tools"] for row in rows]
                for row, prompt, reply in zip(rows, *dpo.encode_replies(tokenizer, prompts, replies, tools), strict=True):
                    if len(prompt) >= job.max_length:
                        aside["prompt_too_long"] += 1
                        continue
                    for name, value in zip(columns, (prompt, reply, row["label"]), strict=True):
                        columns[name].append(value)
                    kept_ids.append(row["id"])
                    kept_tokens.append(min(len(reply), job.max_length - len(prompt)))
                spool.write(columns)
        except KeyError as error:
            if "has no column" not in str(error):
                raise
            raise ValueError(
                f"input {item.name!r} has no labels ({error.args[0]}): KTO needs conversations marked good or bad, as a "
                "conversations stage reads them with `format: kto`"
            ) from error
        ids.append(pa.array(kept_ids, pa.string()))
        tokens.append(np.array(kept_tokens, np.int64))
    return Examples(spool.finish(), ids, tokens, dict(sorted(aside.items())))


def _usable(row: dict[str, Any], aside: Counter[str]) -> bool:
    if row["label"] is None:
        aside["no_label"] += 1
        return False
    if len(row["messages"]) < 2 or row["messages"][-1]["role"] != "assistant":
        aside["no_reply_at_the_end"] += 1
        return False
    return True


def in_order(job: KtoJob, examples: Examples, order: np.ndarray) -> Examples:
    """The rows of all positions one after another, each with the reply of the position before it in its batch.

    The columns are those of pairs, reply and mismatched reply, so that the reference is computed as for pairs. What a run
    takes is written to disk once, memory-mapped; an example taken in two epochs lies there twice, with two other replies.
    """
    schema = pa.schema([pa.field(name, pa.list_(pa.int32())) for name in reference.PAIRS] + [pa.field("label", pa.bool_())])
    spool = ArrowSpool(schema)
    batch = job.batch_examples
    positions = np.arange(len(order))
    before = order[positions // batch * batch + (positions % batch - 1) % batch]
    for start in range(0, len(order), _SPOOL_ROWS):
        part = slice(start, start + _SPOOL_ROWS)
        own = examples.table.take(pa.array(order[part]))
        other = examples.table.column("completion_ids").take(pa.array(before[part]))
        if job.loss != "kto":
            other = pa.chunked_array([pa.array([[]] * len(own), pa.list_(pa.int32()))])  # nothing is compared with
        spool.write(
            {
                "prompt_ids": own.column("prompt_ids"), "chosen_ids": own.column("completion_ids"), "rejected_ids": other,
                "label": own.column("label"),
            }
        )  # fmt: skip
    names = pa.chunked_array(examples.ids, pa.string()).take(pa.array(order)).combine_chunks()
    return Examples(spool.finish(), [names], [np.concatenate(examples.tokens)[order]], {})


def as_dataset(job: KtoJob, laid: Examples) -> Dataset:
    """The rows under the names that TRL's KTO trainer knows."""
    named = {"prompt_ids": "prompt_ids", "label": "label", "chosen_ids": "completion_ids", "ref_chosen_logps": "ref_logps"}
    if job.loss == "kto":
        named |= {"rejected_ids": "KL_completion_ids", "ref_rejected_logps": "ref_KL_logps"}
    table = laid.table.select(list(named)).rename_columns(list(named.values()))
    return finetune.dataset(Examples(table, laid.ids, laid.tokens, {}))
