"""Direct preference optimisation (Rafailov et al. 2023) on preference pairs, against the model it started from."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from cluster import storage
from operators.tokens import holdout
from train import finetune, models
from train.finetune import ArrowSpool, Examples, Follow, PlannedTrainer
from train.parallel import Workers
from train.settings_finetune import DpoJob

_ENCODED = pa.schema(
    [
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("chosen_ids", pa.list_(pa.int32())),
        pa.field("rejected_ids", pa.list_(pa.int32())),
    ]
)


class _Trainer(PlannedTrainer, DPOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """The dataset is encoded already."""
        return dataset


def run(job: DpoJob, directory: str, workers: Workers) -> dict[str, Any]:
    """Align and export to `directory`/model (adapters merged) and `directory`/adapter.

    The reference is the model that training starts from: with LoRA the same weights with the fresh adapter switched off,
    without it a second, frozen copy. Called again after a crash it goes on from the last checkpoint; when finished it
    returns the result on file. Raises JobCancelled, ValueError for inputs without a usable pair.
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
        reference = models.load(job.model) if job.lora is None else None
        return model, tokenizer, examples, examples.mixture(job), planned, reference

    model, tokenizer, examples, mixture, job, reference = workers.together(prepare)
    generation = model.generation_config
    keys = {
        "grad_norm": "gradient_norm",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "logps/chosen": "chosen_log_probability",
        "logps/rejected": "rejected_log_probability",
    }
    follow = Follow(workers, job, root, keys, examples)
    trainer = _Trainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(
            **finetune.arguments(job, workers, finetune.output_directory(root)),
            beta=job.beta,
            loss_type=[job.loss],
            label_smoothing=job.label_smoothing,
            precompute_ref_log_probs=False,
        ),
        data_collator=DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=job.max_length),
        train_dataset=finetune.dataset(examples),
        processing_class=tokenizer,
        callbacks=[follow],
        peft_config=finetune.adapter_config(job.lora),
    )
    return finetune.complete(trainer, follow, job, examples, mixture, generation, directory, root, workers)


def encode(job: DpoJob, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Tokenise all pairs that are not held out; those whose prompt alone fills `max_length` are set aside and counted."""
    spool = ArrowSpool(_ENCODED)
    ids: list[pa.Array] = []
    tokens: list[np.ndarray] = []
    aside: Counter[str] = Counter()
    for item in job.inputs:
        kept_ids: list[str] = []
        kept_tokens: list[int] = []
        for batch in finetune.rows_of([item.directory], ["id", "prompt", "chosen", "rejected"]):
            if job.held_out:
                held = holdout.is_held_out(batch["id"], job.seed, job.held_out)
                aside["held_out"] += int(held.sum())
                batch = batch.filter(pa.array(~held))
            batch = finetune.without_control_tokens(batch, ["prompt", "chosen", "rejected"], tokenizer, aside)
            columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
            for key, prompt, chosen, rejected in zip(batch["id"].to_pylist(), *encode_pairs(tokenizer, batch), strict=True):
                if len(prompt) >= job.max_length:
                    aside["prompt_too_long"] += 1
                    continue
                for name, value in zip(columns, (prompt, chosen, rejected), strict=True):
                    columns[name].append(value)
                kept_ids.append(key)
                room = job.max_length - len(prompt)
                kept_tokens.append(min(len(chosen), room) + min(len(rejected), room))
            spool.write(columns)
        ids.append(pa.array(kept_ids, pa.string()))
        tokens.append(np.array(kept_tokens, np.int64))
    return Examples(spool.finish(), ids, tokens, {name: count for name, count in sorted(aside.items()) if count})


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, batch: pa.RecordBatch
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """(prompt, chosen, rejected) token ids of each pair.

    The prompt is rendered with the opening of the assistant's turn, replies end with the token that closes it, as in
    SFT: what is compared is exactly what the model would write.
    """
    prompts = batch["prompt"].to_pylist()
    if not prompts:
        return [], [], []
    opened: Any = tokenizer.apply_chat_template(prompts, tokenize=True, add_generation_prompt=True, return_dict=True)
    openings = opened["input_ids"]
    replies = []
    for column in ("chosen", "rejected"):
        whole: Any = tokenizer.apply_chat_template(
            [prompt + reply for prompt, reply in zip(prompts, batch[column].to_pylist(), strict=True)],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        cut = []
        for opening, ids, mask in zip(openings, whole["input_ids"], whole["assistant_masks"], strict=True):
            if ids[: len(opening)] != opening:
                raise ValueError("the chat template renders a prompt otherwise once a reply follows it; it cannot be used for DPO")
            last = max((index for index, marked in enumerate(mask) if marked), default=len(ids) - 1)
            cut.append(ids[len(opening) : last + 1])
        replies.append(cut)
    return openings, replies[0], replies[1]
