"""Supervised fine-tuning on conversations: loss on what the assistant says, and on nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from cluster import storage
from operators.tokens import holdout
from train import ewc, finetune, layout, lora, models, rehearsal
from train.batches import Step, Steps, TokenRows, step_of
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


class Trainer(PlannedTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, given whole global batches: arranged by length or packed, the loss of each example with its weight.

    The loss of a step is the mean of weight x loss over the tokens with loss of all workers. It is computed by TRL's fused
    head, in as many forward passes as `train.batches` makes of this worker's share.
    """

    job: SftJob
    rows: TokenRows
    held_out: TokenRows | None = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)

    def _step(self, rows: TokenRows, chosen: np.ndarray) -> Step:
        job, workers = self.job, self.workers
        return step_of(
            rows, chosen, workers.rank, workers.world, job.micro_batch_examples, job.max_length if job.packing else None,
            pad=self._tokenizer.pad_token_id, mask=self.aux_loss_enabled,
        )  # fmt: skip

    def get_train_dataloader(self) -> Any:
        return Steps(
            self.order, self.job.batch_examples, lambda chosen: self._step(self.rows, chosen), lambda: int(self.state.global_step)
        )

    def _get_num_items_in_batch(self, batch_samples: list[Step], device: torch.device) -> torch.Tensor:
        return torch.tensor(batch_samples[0].tokens, device=device)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: nobody looks at it, and TRL would read tensors here."""
        return 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(inputs.passes):
            last = number == len(inputs.passes) - 1
            with nullcontext() if last else self.accelerator.no_sync(model=model):
                with self.compute_loss_context_manager():
                    loss, routing = self._losses(model, part)
                    # Gradients are averaged over the workers; the loss is a mean over the tokens of all of them.
                    loss = loss / max(1, inputs.tokens) * self.workers.world
                    # The load balance of experts is a mean over each pass.
                    loss = loss if routing is None else loss + routing / len(inputs.passes)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _losses(self, model: Any, part: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(sum of weight x loss over one pass, weighted loss of the routing of experts)."""
        inputs = self._prepare_inputs(dict(part))
        weights = inputs.pop("weights")[:, 1:]
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**inputs, **routed, use_cache=False, fused_lm_head=True)
        losses = -outputs.log_probs  # [rows, length - 1], zero where there is no label
        with torch.no_grad():
            self._sums += torch.stack([losses.sum(), outputs.is_top1.sum(), outputs.label_mask.sum()]).double()
        return (losses * weights).sum(), self.router_aux_loss_coef * outputs.aux_loss if routed else None

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        if "loss" in logs:
            _, correct, tokens = self._totals()
            logs["mean_token_accuracy"] = correct / max(tokens, 1.0)
            logs["num_tokens"] = tokens
            step = int(self.state.global_step)
            if self.held_out is not None and (step % self.job.evaluate_every == 0 or step == self.job.planned_steps):
                logs[finetune.HELD_OUT_LOSS] = self.held_out_loss()
        super().log(logs, *arguments, **named)

    def _totals(self) -> list[float]:
        """[loss, correct tokens, tokens] of all workers since the last call."""
        totals: list[float] = self.workers.sum(self._sums.clone()).tolist()
        self._sums.zero_()
        return totals

    def held_out_loss(self) -> float:
        """The mean loss over the tokens of all held-out examples, each counted once and alike."""
        rows = self.held_out
        assert rows is not None
        model: Any = self.model
        model.eval()
        size = self.job.batch_examples
        order = np.argsort(-rows.lengths, kind="stable")
        with torch.no_grad(), self.compute_loss_context_manager():
            for start in range(0, len(order), size):
                for part in self._step(rows, order[start : start + size]).passes:
                    self._losses(self.model_wrapped, part)
        model.train()
        layout.reshard(model)
        loss, _, tokens = self._totals()
        return loss / max(1.0, tokens)


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
        lora.check(job)
        model, tokenizer = lora.load_base(job.model, job.lora, workers.device), models.load_tokenizer(job.model)
        models.as_chat(tokenizer, model, job.chat_template)
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
            **{
                **finetune.arguments(job, workers, finetune.output_directory(root)),
                # A "batch" is a whole step (train.batches), and what was done is not gone through again when a run goes on.
                "per_device_train_batch_size": job.batch_examples // workers.world,
                "gradient_accumulation_steps": 1,
                "ignore_data_skip": True,
            },
            neftune_noise_alpha=job.neftune_alpha,
            dataset_kwargs={"skip_prepare_dataset": True},
            packing=False,
            shuffle_dataset=False,
        ),
        train_dataset=finetune.dataset(examples),
        processing_class=tokenizer,
        callbacks=[follow],
        peft_config=lora.adapter_config(job.lora),
    )
    trainer.rows = TokenRows(examples.table)
    if examples.held_out is not None:
        trainer.held_out = TokenRows(examples.held_out)
    if job.ewc:
        trainer.penalties = {"ewc_penalty": ewc.Ewc(job.ewc, job.model, cast(torch.nn.Module, trainer.model), workers)}
    return finetune.complete(trainer, follow, job, examples, mixture, generation, directory, root, workers)


def encode(job: SftJob, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Tokenise all inputs: labels on assistant tokens of conversations, on all tokens of documents (`train.rehearsal`).

    An example without any (no assistant turn, or all of it beyond `max_length`) is set aside and counted.
    """
    spool, apart = ArrowSpool(_ENCODED), ArrowSpool(_ENCODED)
    ids: list[pa.Array] = []
    tokens: list[np.ndarray] = []
    aside: Counter[str] = Counter()
    for item in job.inputs:
        kept_ids: list[str] = []
        kept_tokens: list[int] = []
        for keys, encoded in _rows(item.directory, job.max_length, tokenizer, aside):
            taken: dict[str, list[Any]] = {name: [] for name in _ENCODED.names}
            kept: dict[str, list[Any]] = {name: [] for name in _ENCODED.names}
            measured = holdout.is_held_out(keys, job.seed, job.held_out)
            apart_rows = finetune.held_out(item, keys, job.seed, job.held_out)
            marks = zip(apart_rows.tolist(), measured.tolist(), strict=True)
            for key, (held, early), (input_ids, labels) in zip(keys, marks, encoded, strict=True):
                cut = [IGNORE, *labels[1 : job.max_length]]  # nothing foretells the first token
                count = sum(label != IGNORE for label in cut)
                if not count:
                    aside["no_assistant_turn" if count == sum(label != IGNORE for label in labels) else "prompt_too_long"] += 1
                    continue
                if held and not early:
                    aside["held_out"] += 1  # scored before and after, and no part of the held-out loss
                    continue
                columns = kept if held else taken
                columns["input_ids"].append(input_ids[: job.max_length])
                columns["labels"].append(cut)
                columns["weight"].append(item.loss_weight)
                if held:
                    aside["held_out"] += 1
                else:
                    kept_ids.append(key)
                    kept_tokens.append(count)
            spool.write(taken)
            apart.write(kept)
        ids.append(pa.array(kept_ids, pa.string()))
        tokens.append(np.array(kept_tokens, np.int64))
    held = apart.finish()
    if job.held_out and not held.num_rows:
        raise ValueError(f"held_out: {job.held_out} of {sum(map(len, ids))} examples is none; raise it, or leave it out")
    return Examples(spool.finish(), ids, tokens, dict(sorted(aside.items())), held if held.num_rows else None)


def _rows(
    directory: str, max_length: int, tokenizer: PreTrainedTokenizerBase, aside: Counter[str]
) -> Iterator[tuple[list[str], list[tuple[list[int], list[int]]]]]:
    """Ids, and input ids with labels, of the usable rows of an input, batch by batch."""
    if rehearsal.holds_documents(directory):
        for keys, pieces in rehearsal.documents(directory, tokenizer, max_length, aside):
            yield keys, [(tokens, tokens) for tokens in pieces]
        return
    for batch in finetune.rows_of([directory], ["id", "messages", "tools"]):
        rows = finetune.without_control_tokens(batch, ["messages"], tokenizer, aside).to_pydict()
        encoded = encode_conversations(tokenizer, rows["messages"], rows["tools"])
        usable = [(key, item) for key, item in zip(rows["id"], encoded, strict=True) if item[0]]
        if len(usable) < len(encoded):
            aside["refused_by_chat_template"] += len(encoded) - len(usable)
        yield [key for key, _ in usable], [item for _, item in usable]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]], tools: list[str | None]
) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of each conversation by the tokenizer's chat template, whose generation marks give the labels.

    Both are empty for a conversation that the template refuses (some know no system prompt, or want
    user and assistant to alternate).
    """
    plain = [index for index, tool in enumerate(tools) if not tool]
    result: list[tuple[list[int], list[int]]] = [([], []) for _ in conversations]

    def put(indices: list[int], schemas: list[Any] | None) -> None:
        try:
            encoded: Any = tokenizer.apply_chat_template(
                [conversations[index] for index in indices],
                tools=schemas,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except TemplateError:
            for index in indices if len(indices) > 1 else ():
                put([index], schemas)
            return
        for index, input_ids, mask in zip(indices, encoded["input_ids"], encoded["assistant_masks"], strict=True):
            labels = [token if marked else IGNORE for token, marked in zip(input_ids, mask, strict=True)]
            result[index] = (input_ids, labels)

    if plain:
        put(plain, None)
    for index, tool in enumerate(tools):
        if tool:
            put([index], json.loads(tool))
    return result
