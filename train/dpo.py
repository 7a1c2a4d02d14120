"""Preference alignment on pairs: DPO (Rafailov et al. 2023) and the family of losses around it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from cluster import storage
from train import finetune, lora, models, reference, reference_free
from train.finetune import ArrowSpool, Examples, Follow, PlannedTrainer
from train.loader import IGNORE
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
    """TRL's DPO trainer with a reference that was computed before, losses without one, and means over the global batch."""

    job: DpoJob
    _tokens: torch.Tensor | None = None  # over which an `sft` or `orpo` term of the current step is a mean, on all workers

    def __init__(self, job: DpoJob, **given: Any) -> None:
        self.job = job
        super().__init__(**given)
        # With adapters TRL needs no reference model and would compute the reference anew in every step.
        self.precompute_ref_logps = True
        pairs = [(name, weight) for name, weight in job.losses.items() if name != "sft"]
        self.loss_types, self.loss_weights = [name for name, _ in pairs], [weight for _, weight in pairs]

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """The dataset is encoded already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """The reference's log-probabilities are columns of the dataset already (`train.reference`)."""
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor | None:
        if not {"sft", "orpo"} & self.job.losses.keys():
            return None
        counts = torch.stack([self._learned(batch).sum() for batch in batch_samples])
        return self.accelerator.gather(counts.sum().to(device)).sum()

    def _learned(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """bool[pairs, length - 1]: the tokens that an `sft` or `orpo` term learns: of the chosen reply; ORPO's prompt as well."""
        mask = batch["attention_mask" if "orpo" in self.job.losses else "completion_mask"]
        return mask.chunk(2)[0][:, 1:].bool()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if return_outputs:
            raise ValueError("preference training returns no outputs")
        self._tokens = num_items_in_batch
        if self.job.reference_free:
            return self._reference_free_loss(model, inputs)
        said: list[Any] = []

        def listening(**asked: Any) -> Any:
            said.append(model(**asked))
            return said[-1]

        loss = self._compute_loss(listening, inputs, False)
        if "sft" in self.job.losses:
            loss = loss + self.job.losses["sft"] * self._negative_log_likelihood(said[0].log_probs, inputs)
        return loss

    def _negative_log_likelihood(self, scores: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """This pass's part of the mean over the tokens of the global batch.

        Trainer divides by the number of passes, and gradients (as the logged loss) are a mean over workers: both undone.
        """
        total = -scores.chunk(2)[0][self._learned(inputs)].sum()
        return total * self.accelerator.num_processes * self.current_gradient_accumulation_steps / self._tokens

    def _reference_free_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        name = self.loss_types[0]
        mask = inputs["completion_mask"].clone()
        learned = mask.clone()
        if name == "orpo":
            half = len(mask) // 2
            learned[:half] = inputs["attention_mask"][:half]
        asked = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        labels = inputs["input_ids"].masked_fill(learned == 0, IGNORE)
        scores = model(**asked, labels=labels, fused_lm_head=True).log_probs
        chosen, rejected = reference_free.sequence_scores(name, scores, mask[:, 1:])
        job = self.job
        compared = reference_free.preference_loss(name, chosen, rejected, job.beta, job.label_smoothing, job.simpo_gamma)
        loss = job.losses[name] * compared.mean()
        if name == "orpo":
            loss = loss + job.losses[name] * self._negative_log_likelihood(scores, inputs)
        elif "sft" in job.losses:
            loss = loss + job.losses["sft"] * self._negative_log_likelihood(scores, inputs)
        measured = {
            "rewards/chosen": job.beta * chosen,
            "rewards/rejected": job.beta * rejected,
            "rewards/margins": job.beta * (chosen - rejected),
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        for key, value in measured.items():
            self._metrics["train"][key].append(self.accelerator.gather(value.detach()).mean().item())
        return loss


_CURVES = {
    "grad_norm": "gradient_norm",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_log_probability",
    "logps/rejected": "rejected_log_probability",
}


def run(job: DpoJob, directory: str, workers: Workers) -> dict[str, Any]:
    """Align and export to `directory`/model (adapters merged) and `directory`/adapter.

    The reference is the model that training starts from, adapters that it came with included: its log-probabilities are
    computed once, before the first step, and kept (`train.reference`); no second model is held. Called again after a crash
    it goes on from the last checkpoint; when finished it returns the result on file. Raises JobCancelled, ValueError for
    inputs without a usable pair and for a batch that the loss cannot be cut into.
    """
    root = storage.join(directory, "checkpoints")
    finished = finetune.finished(directory, root, workers)
    if finished is not None:
        return finished
    share = job.batch_examples // workers.world
    if job.losses.keys() & {"aot", "aot_unpaired"} and (workers.world > 1 or (job.micro_batch_examples or share) < share):
        raise ValueError(
            "the losses aot and aot_unpaired sort the whole batch, which must be one forward pass of one worker: "
            "leave micro_batch_examples out and train on one worker, or use another loss"
        )

    def load() -> Any:
        model = lora.load_base(job.model, job.lora, workers.device)
        model.config.use_cache = False
        return model

    def prepare() -> tuple[Any, ...]:
        lora.check(job)
        model, tokenizer = load(), models.load_tokenizer(job.model)
        models.as_chat(tokenizer, model, job.chat_template)
        examples = encode(job, tokenizer)
        return model, tokenizer, examples, examples.mixture(job), finetune.settled(job, examples)

    model, tokenizer, examples, mixture, job = workers.together(prepare)
    generation = model.generation_config
    if not job.reference_free:
        cache = job.reference_cache or storage.join(directory, "reference")
        order = finetune.planned_order(examples, mixture, job)
        if reference.is_cut(job, workers):
            model = None
        examples = reference.attach(job, model, load, tokenizer, examples, order, cache, workers)
        if model is None:
            model = workers.together(load)
            model.generation_config = generation
    follow = Follow(workers, job, root, _CURVES, examples)
    trainer = _Trainer(
        job,
        model=model,
        args=DPOConfig(
            **finetune.arguments(job, workers, finetune.output_directory(root)),
            beta=job.beta,
            loss_type=["sigmoid"] if job.reference_free else list(job.losses),
            label_smoothing=0.0 if job.reference_free else job.label_smoothing,
            ld_alpha=job.ld_alpha,
            f_divergence_type=job.f_divergence,
            f_alpha_divergence_coef=job.f_alpha,
            use_weighting=job.weighting,
            discopop_tau=job.discopop_tau,
            # Without adapters TRL would otherwise load a second model. (It also hashes this one, which nobody reads.)
            precompute_ref_log_probs=job.lora is None,
        ),
        data_collator=DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=job.max_length),
        train_dataset=finetune.dataset(examples),
        processing_class=tokenizer,
        callbacks=[follow],
        peft_config=lora.adapter_config(job.lora),
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
            held = finetune.held_out(item, batch["id"], job.seed, job.held_out)
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
    openings, chosen = encode_replies(tokenizer, prompts, batch["chosen"].to_pylist())
    return openings, chosen, encode_replies(tokenizer, prompts, batch["rejected"].to_pylist())[1]


def encode_replies(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    replies: Sequence[list[dict[str, str]]],
    tools: Sequence[str | None] | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """(prompt, reply) token ids; `tools` are the functions of each conversation as JSON."""
    openings: list[list[int]] = [[] for _ in prompts]
    cut: list[list[int]] = [[] for _ in prompts]
    groups: dict[str | None, list[int]] = {}
    for index in range(len(prompts)):
        groups.setdefault((tools[index] if tools is not None else None) or None, []).append(index)
    for schemas, indices in groups.items():
        told: dict[str, Any] = {"tokenize": True, "return_dict": True, "tools": json.loads(schemas) if schemas else None}
        opened: Any = tokenizer.apply_chat_template([prompts[i] for i in indices], add_generation_prompt=True, **told)
        whole: Any = tokenizer.apply_chat_template(
            [[*prompts[i], *replies[i]] for i in indices], return_assistant_tokens_mask=True, **told
        )
        for index, opening, ids, mask in zip(
            indices, opened["input_ids"], whole["input_ids"], whole["assistant_masks"], strict=True
        ):
            if ids[: len(opening)] != opening:
                raise ValueError(
                    "the chat template renders a prompt otherwise once a reply follows it; it cannot be used for alignment"
                )
            last = max((place for place, marked in enumerate(mask) if marked), default=len(ids) - 1)
            openings[index], cut[index] = opening, ids[len(opening) : last + 1]
    return openings, cut
