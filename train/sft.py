"""Supervised fine-tuning on conversations: loss on what the assistant says, and on nothing else."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cluster import storage
from train import finetune, models
from train.finetune import ArrowSpool, Examples, Follow, PlannedTrainer
from train.loader import IGNORE
from train.parallel import Workers
from train.settings_finetune import SftJob

_ENCODED = pa.schema([pa.field("input_ids", pa.list_(pa.int32())), pa.field("labels", pa.list_(pa.int32()))])


class _Trainer(PlannedTrainer, SFTTrainer):  # type: ignore[misc]
    pass


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
        return model, tokenizer, examples, examples.mixture(job)

    model, tokenizer, examples, mixture = workers.together(prepare)
    generation = model.generation_config
    follow = Follow(workers, job, root, {"grad_norm": "gradient_norm", "mean_token_accuracy": "accuracy"}, examples)
    trainer = _Trainer(
        model=model,
        args=SFTConfig(
            **finetune.arguments(job, workers, finetune.output_directory(root)),
            neftune_noise_alpha=job.neftune_alpha,
            dataset_kwargs={"skip_prepare_dataset": True},
            packing=False,
            shuffle_dataset=False,
        ),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
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
            columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
            for key, (input_ids, labels) in zip(rows["id"], encoded, strict=True):
                cut = labels[: job.max_length]
                count = sum(label != IGNORE for label in cut)
                if not count:
                    aside["no_assistant_turn" if count == sum(label != IGNORE for label in labels) else "prompt_too_long"] += 1
                    continue
                columns["input_ids"].append(input_ids[: job.max_length])
                columns["labels"].append(cut)
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
