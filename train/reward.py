"""A reward model from preference pairs: the Bradley-Terry model of Ouyang et al. 2022, section 3.5, by TRL's trainer."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForSequenceClassification, GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from cluster import storage
from train import adapters, finetune, layout, lora, models, templates
from train.finetune import ArrowSpool, Examples, Follow, PlannedTrainer
from train.parallel import Workers
from train.rendering import encoded, rendered
from train.settings_alignment import RewardModelJob

_CLASSIFIER = "ForSequenceClassification"


class _Trainer(PlannedTrainer, RewardTrainer):  # type: ignore[misc]
    """TRL's reward trainer on rows that are encoded already; measures the held-out pairs at the end."""

    job: RewardModelJob
    held_out: pa.Table | None = None

    def __init__(self, job: RewardModelJob, **given: Any) -> None:
        self.job = job
        super().__init__(**given)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """The dataset is encoded already."""
        return dataset

    def finale(self) -> dict[str, Any]:
        if self.held_out is None:
            return {}
        chosen, rejected = (self.scores(self.held_out.column(name).to_pylist()) for name in ("chosen_ids", "rejected_ids"))
        difference = chosen - rejected
        return {
            "held_out": {
                "pairs": len(difference),
                "accuracy": round(float((difference > 0).mean()), 6),
                "margin": round(float(difference.mean()), 6),
                "loss": round(float(np.logaddexp(0.0, -difference).mean()), 6),
            }
        }

    def scores(self, rows: list[list[int]]) -> np.ndarray:
        """float64[rows]: the reward of each encoded conversation, on every worker; each scores its share."""
        size = max(1, self.job.batch_examples // self.workers.world)
        order = np.argsort([-len(row) for row in rows], kind="stable")
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        found = torch.zeros(len(rows), dtype=torch.float64, device=self.args.device)
        model: Any = self.model
        model.eval()
        rounds = -(-len(batches) // self.workers.world)
        with torch.no_grad(), self.compute_loss_context_manager():
            # A sharded model is called by all workers alike: one without a batch of its own does the last one again.
            for number in range(rounds):
                index = number * self.workers.world + self.workers.rank
                batch = batches[min(index, len(batches) - 1)]
                inputs = padded([rows[row] for row in batch], int(model.config.pad_token_id))
                logits = model(**{name: value.to(self.args.device) for name, value in inputs.items()}, use_cache=False).logits
                if index < len(batches):
                    found[torch.tensor(batch, device=self.args.device)] = logits[:, 0].double()
        model.train()
        layout.reshard(model)
        return self.workers.sum(found).cpu().numpy()


def padded(rows: list[list[int]], padding: int) -> dict[str, torch.Tensor]:
    """Token ids and their mask, int64[rows, longest], padded at the end."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [padding] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
    }


_CURVES = {
    "grad_norm": "gradient_norm",
    "accuracy": "accuracy",
    "margin": "margin",
    "mean_reward": "mean_reward",
    "min_reward": "least_reward",
    "max_reward": "greatest_reward",
}


def run(job: RewardModelJob, directory: str, workers: Workers) -> dict[str, Any]:
    """Train a reward model and export it to `directory`/model, as a sequence classifier with one output and the chat template.

    Called again after a crash it goes on from the last checkpoint; when finished it returns the result on file. Raises
    JobCancelled, ValueError for inputs without a usable pair and for a model that cannot become a classifier.
    """
    root = storage.join(directory, "checkpoints")
    finished = finetune.finished(directory, root, workers)
    if finished is not None:
        return finished

    def prepare() -> tuple[Any, ...]:
        lora.check(job)
        if job.lora is not None and job.lora.quantize != "none":
            raise ValueError("lora.quantize is not supported for a reward model, whose head is new; leave it out")
        model, tokenizer = classifier(job.model, job.seed, job.chat_template)
        examples = encode(job, tokenizer)
        return model, tokenizer, examples, examples.mixture(job), finetune.settled(job, examples)

    model, tokenizer, examples, mixture, job = workers.together(prepare)
    follow = Follow(workers, job, root, _CURVES, examples)
    given = finetune.arguments(job, workers, finetune.output_directory(root))
    del given["max_length"]  # pairs that are too long are set aside before
    trainer = _Trainer(
        job,
        model=model,
        args=RewardConfig(**given, max_length=None, center_rewards_coefficient=job.center),
        data_collator=DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id),
        train_dataset=finetune.dataset(examples),
        processing_class=tokenizer,
        callbacks=[follow],
        peft_config=adapter_config(job),
    )
    trainer.held_out = examples.held_out
    return finetune.complete(trainer, follow, job, examples, mixture, GenerationConfig(), directory, root, workers)


def adapter_config(job: RewardModelJob) -> LoraConfig | None:
    """Adapters for a classifier: its head, which is new, is trained whole."""
    config = lora.adapter_config(job.lora)
    if config is not None:
        config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    return config


def classifier(path: str, seed: int, chat_template: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with one output and its tokenizer with a chat template (of `chat_template`, where that is given).

    A causal model keeps its body (merged with an adapter, if it has one) and gets a new head, the same for one seed on every
    worker; a reward model goes on as it is. Raises ValueError for an architecture that has no classifier.
    """
    tokenizer = models.load_tokenizer(path)
    templates.prepare(tokenizer, chat_template)
    # What is asked later is the text of the exported template, without marks.
    tokenizer.chat_template = templates.unmarked(str(tokenizer.chat_template))
    found: Any = _reward_model(path)
    if found is None:
        causal: Any = models.load(path)
        labels = {"id2label": {0: "reward"}, "label2id": {"reward": 0}}
        config = AutoConfig.for_model(**{**causal.config.to_dict(), **labels, "architectures": None})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                found = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
            except ValueError as error:
                raise ValueError(f"no reward model can be made of {path}: {error}") from None
        if not hasattr(found, "score"):
            raise ValueError(f"no reward model can be made of {path}: {type(found).__name__} has no head named `score`")
        body = getattr(causal, causal.base_model_prefix)
        getattr(found, found.base_model_prefix).load_state_dict(body.state_dict())
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no padding token, by which a reward model finds the end of a reply")
    found.config.pad_token_id, found.config.use_cache = tokenizer.pad_token_id, False
    return found, tokenizer


def _reward_model(path: str) -> PreTrainedModel | None:
    """The sequence classifier at a path; None for another kind of model, or one with an adapter beside it."""
    if adapters.find(path) is not None:
        return None
    directory = models.model_directory(path)
    described = json.loads((directory / "config.json").read_text("utf-8"))
    if not any(name.endswith(_CLASSIFIER) for name in described.get("architectures") or ()):
        return None
    found = AutoModelForSequenceClassification.from_pretrained(
        directory,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation="sdpa",
    )
    if found.config.num_labels != 1:
        raise ValueError(f"{path} is a classifier of {found.config.num_labels} labels; a reward model has one output")
    return found


def encode(job: RewardModelJob, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Tokenise all pairs as whole conversations, as a reward model is asked; held-out ones apart, too long ones set aside."""
    names = ["chosen_ids", "rejected_ids", *(["margin"] if job.margin_weight else [])]
    schema = pa.schema([pa.field(name, pa.float32() if name == "margin" else pa.list_(pa.int32())) for name in names])
    spool, apart = ArrowSpool(schema), ArrowSpool(schema)
    ids: list[pa.Array] = []
    tokens: list[np.ndarray] = []
    aside: Counter[str] = Counter()
    for item in job.inputs:
        kept_ids: list[str] = []
        kept_tokens: list[int] = []
        for batch in finetune.rows_of([item.directory], ["id", "prompt", "chosen", "rejected", "margin"]):
            batch = finetune.without_control_tokens(batch, ["prompt", "chosen", "rejected"], tokenizer, aside)
            taken: dict[str, list[Any]] = {name: [] for name in names}
            kept: dict[str, list[Any]] = {name: [] for name in names}
            rows = batch.to_pydict()
            held_out = finetune.held_out(item, batch["id"], job.seed, job.held_out)
            pairs = encode_pairs(tokenizer, rows)
            for key, held, pair, margin in zip(rows["id"], held_out.tolist(), pairs, rows["margin"], strict=True):
                if pair is None:
                    aside["refused_by_chat_template"] += 1
                    continue
                chosen, rejected = pair
                if max(len(chosen), len(rejected)) > job.max_length:
                    aside["too_long"] += 1
                    continue
                columns = kept if held else taken
                columns["chosen_ids"].append(chosen)
                columns["rejected_ids"].append(rejected)
                if job.margin_weight:
                    columns["margin"].append(job.margin_weight * (margin or 0.0))
                if held:
                    aside["held_out"] += 1
                else:
                    kept_ids.append(key)
                    kept_tokens.append(len(chosen) + len(rejected))
            spool.write(taken)
            apart.write(kept)
        ids.append(pa.array(kept_ids, pa.string()))
        tokens.append(np.array(kept_tokens, np.int64))
    held = apart.finish()
    return Examples(spool.finish(), ids, tokens, dict(sorted(aside.items())), held if held.num_rows else None)


def encode_pairs(tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[Any]]) -> list[tuple[list[int], list[int]] | None]:
    """(chosen, rejected) token ids of each prompt with each reply, by the chat template to its end; None where it refuses."""
    texts = []
    for column in ("chosen", "rejected"):
        texts.append(rendered(tokenizer, [prompt + reply for prompt, reply in zip(rows["prompt"], rows[column], strict=True)]))
    whole = [index for index, pair in enumerate(zip(*texts, strict=True)) if None not in pair]
    ids = [encoded(tokenizer, [str(column[index]) for index in whole]) for column in texts]
    found: list[tuple[list[int], list[int]] | None] = [None] * len(texts[0])
    for index, chosen, rejected in zip(whole, *ids, strict=True):
        found[index] = (chosen, rejected)
    return found
