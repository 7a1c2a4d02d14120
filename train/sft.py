"""Supervised fine-tuning on conversations: loss on what the assistant says, and on nothing else."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cluster import storage
from train import finetune, models
from train.finetune import ArrowSpool, Examples, Follow, PlannedTrainer
from train.loader import IGNORE
from train.parallel import Workers
from train.settings_finetune import SftJob

_ENCODED = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("weight", pa.float32()),  # of the example's loss
    ]
)


@dataclass
class Collate(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """Pads examples to the longest and passes on what the loss of each counts: `weights`, float [rows, 1]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        batch["weights"] = torch.tensor([[example["weight"]] for example in examples], dtype=torch.float32)
        return batch


class Trainer(PlannedTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with a weight for the loss of each example: the mean of weight x loss over the tokens of all workers."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["input_ids", "labels", "weight"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if return_outputs:
            raise ValueError("this trainer gives losses only")
        weights = inputs.pop("weights")
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**inputs, **routed, use_cache=False, fused_lm_head=True)
        losses = -outputs.log_probs  # [rows, length - 1], zero where there is no label
        with torch.no_grad():
            self._sums += torch.stack([losses.sum(), outputs.is_top1.sum(), outputs.label_mask.sum()]).double()
        # Gradients are averaged over the workers, the loss is a mean over the tokens of all of them.
        loss = (losses * weights).sum() / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes
        if routed:  # a mean over each micro batch
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        return loss

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        if "loss" in logs:
            _, correct, tokens = self.accelerator.reduce(self._sums).tolist()
            logs["mean_token_accuracy"] = correct / max(tokens, 1.0)
            self._sums.zero_()
        super().log(logs, *arguments, **named)


def run(job: SftJob, directory: str, workers: Workers) -> dict[str, Any]:
    """Fine-tune and export to `directory`/model (adapters merged) and `directory`/adapter.

    TRL divides the loss by the number of assistant tokens of the whole global batch. Called again after a crash it goes
    on from the last checkpoint; when finished it returns the result on file. Raises JobCancelled, ValueError for inputs
    without a usable conversation.
    """
    root = storage.join(directory, "checkpoints")
    finished = finetune.finished(directory, root, workers)
    if finished is not None:
        return finished

    def prepare() -> tuple[Any, ...]:
        model, tokenizer = models.load(job.model), models.load_tokenizer(job.model)
        models.as_chat(tokenizer, model)
        model.config.use_cache = False
        examples = encode(job, tokenizer)
        planned = finetune.settled(job, examples)
        return model, tokenizer, examples, examples.mixture(job), planned

    model, tokenizer, examples, mixture, job = workers.together(prepare)
    generation = model.generation_config
    follow = Follow(workers, job, root, {"grad_norm": "gradient_norm", "mean_token_accuracy": "accuracy"}, examples)
    trainer = Trainer(
        model=model,
        args=SFTConfig(
            **finetune.arguments(job, workers, finetune.output_directory(root)),
            neftune_noise_alpha=job.neftune_alpha,
            dataset_kwargs={"skip_prepare_dataset": True},
            packing=False,
            shuffle_dataset=False,
        ),
        data_collator=Collate(pad_token_id=tokenizer.pad_token_id),
        train_dataset=finetune.dataset(examples),
        processing_class=tokenizer,
        callbacks=[follow],
        peft_config=finetune.adapter_config(job.lora),
    )
    return finetune.complete(trainer, follow, job, examples, mixture, generation, directory, root, workers)


def encode(job: SftJob, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Tokenise all inputs, labels on assistant tokens only.

    An example without any (no assistant turn, or all of it beyond `max_length`) is set aside and counted.
    """
    spool = ArrowSpool(_ENCODED)
    ids: list[pa.Array] = []
    tokens: list[np.ndarray] = []
    aside: Counter[str] = Counter()
    for item in job.inputs:
        kept_ids: list[str] = []
        kept_tokens: list[int] = []
        for batch in finetune.rows_of([item.directory], ["id", "messages", "tools"]):
            rows = finetune.without_control_tokens(batch, ["messages"], tokenizer, aside).to_pydict()
            encoded = encode_conversations(tokenizer, rows["messages"], rows["tools"])
            columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "weight": []}
            for key, (input_ids, labels) in zip(rows["id"], encoded, strict=True):
                cut = labels[: job.max_length]
                count = sum(label != IGNORE for label in cut)
                if not count:
                    aside["no_assistant_turn" if count == sum(label != IGNORE for label in labels) else "prompt_too_long"] += 1
                    continue
                columns["input_ids"].append(input_ids[: job.max_length])
                columns["labels"].append(cut)
                columns["weight"].append(item.loss_weight)
                kept_ids.append(key)
                kept_tokens.append(count)
            spool.write(columns)
        ids.append(pa.array(kept_ids, pa.string()))
        tokens.append(np.array(kept_tokens, np.int64))
    return Examples(spool.finish(), ids, tokens, dict(sorted(aside.items())))


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]], tools: list[str | None]
) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of each conversation by the tokenizer's chat template, whose generation marks give the labels."""
    plain = [index for index, tool in enumerate(tools) if not tool]
    result: list[tuple[list[int], list[int]] | None] = [None] * len(conversations)

    def put(indices: list[int], schemas: list[Any] | None) -> None:
        encoded: Any = tokenizer.apply_chat_template(
            [conversations[index] for index in indices],
            tools=schemas,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        for index, input_ids, mask in zip(indices, encoded["input_ids"], encoded["assistant_masks"], strict=True):
            labels = [token if marked else IGNORE for token, marked in zip(input_ids, mask, strict=True)]
            result[index] = (input_ids, labels)

    if plain:
        put(plain, None)
    for index, tool in enumerate(tools):
        if tool:
            put([index], json.loads(tool))
    return [item for item in result if item is not None]
