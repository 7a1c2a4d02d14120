"""Reinforcement learning with verifiable rewards: GRPO (Shao et al. 2024) and RLOO (Ahmadian et al. 2024) by TRL's trainers.

A step takes the next `batch_examples` prompts of the planned order, draws a group of replies to each, scores them and learns
from how each compares with its group. A group stays on one worker. Draws are functions of position (`train.sampling`), so a run
that was killed goes on as if nothing had happened. Replies with their rewards are kept, step by step, and become the stage's rows.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import Sampler
from transformers import GenerationConfig, TrainerControl, TrainerState, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import add_fused_lm_head, split_tensor_dict

from cluster import storage
from operators import shards, tables
from operators.ledger import Ledger
from operators.quality.model_scorer import Scoring
from operators.synthesis.reward import ConversationScorer
from train import finetune, lora, models, samples, sampling, sharding, verify
from train.finetune import ArrowSpool, Examples, Follow, PlannedTrainer
from train.mixture import Draw, Mixture
from train.parallel import Workers
from train.rendering import encoded, rendered
from train.settings_alignment import GrpoJob, RewardModelCheck
from train.settings_finetune import FinetuneJob

with warnings.catch_warnings():
    # TRL names the versions of vLLM that it was tried with; those who draw replies by vLLM read of that in docs/alignment.md.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

_ENCODED = pa.schema(
    [
        pa.field("prompt", pa.list_(tables.MESSAGE)),
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("reference", pa.string()),
    ]
)
_EDGE = 10  # steps at either end over which rewards are averaged for the result


class _Repeated(Mixture):
    """A stream whose every batch comes `times` in a row: the steps that are taken on one round of replies."""

    def __init__(self, *arguments: Any, batch: int, times: int) -> None:
        super().__init__(*arguments)
        self._batch, self._times = batch, times

    def locate(self, positions: np.ndarray) -> Draw:
        positions = np.asarray(positions, np.int64)
        step, place = positions // self._batch, positions % self._batch
        return super().locate(step // self._times * self._batch + place)


@dataclass
class Prompts(Examples):
    """Prompts to be answered; `tokens` are those of the prompts."""

    def mixture(self, job: FinetuneJob) -> Mixture:
        plain = super().mixture(job)
        times = job.iterations if isinstance(job, GrpoJob) else 1
        shares = [float(share) for share in plain.shares]
        return _Repeated(plain.sizes.tolist(), shares, job.seed, plain.names, batch=job.batch_examples, times=times)


class _Groups(Sampler[int]):
    """Rows of the dataset, each `group` times in a row, and each step's rows `passes` times, once for each forward pass."""

    def __init__(self, order: np.ndarray, batch: int, group: int, passes: int) -> None:
        self._order, self._batch, self._group, self._passes = order, batch, group, passes

    def __iter__(self) -> Iterator[int]:
        for start in range(0, len(self._order), self._batch):
            rows = np.repeat(self._order[start : start + self._batch], self._group).tolist()
            for _ in range(self._passes):
                yield from rows

    def __len__(self) -> int:
        return len(self._order) * self._group * self._passes


class _Follow(Follow):
    """Stops only between rounds of replies, for a round cannot be taken up in its middle."""

    job: GrpoJob

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        super().on_log(args, state, control, **named)
        if self.stopped and state.global_step % self.job.iterations:
            control.should_save = control.should_training_stop = False
        elif self.stopped:
            control.should_save = control.should_training_stop = True


class _Rollouts(PlannedTrainer):
    """What GRPO and RLOO share: how prompts come, how replies are drawn, scored and kept."""

    job: GrpoJob
    mixture: Mixture
    examples: Prompts
    scorers: dict[str, verify.Function]
    follow: Follow
    directory: str

    def attend(self, reference: Any) -> None:
        """Take the model that training is held to, where it is one of its own and not the base of an adapter."""
        trainer: Any = self
        trainer.beta = self.job.beta
        if reference is None:
            return
        add_fused_lm_head(reference, temperature=self.job.temperature)
        reference.eval().requires_grad_(False)
        if self.job.sharding == "fsdp2" and self.workers.world > 1:
            sharding.shard(reference, self.workers)
        else:
            reference.to(self.workers.device)
        trainer.ref_model = reference

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        trainer: Any = self
        return _Groups(self.order, self.job.batch_examples, self.job.samples, trainer.args.steps_per_generation)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's, without shuffling a round's replies: their order would hang on the number of workers."""
        trainer: Any = self
        passes = trainer.args.steps_per_generation
        if trainer._step % (passes * trainer.num_iterations) == 0 or trainer._buffered_inputs is None:
            found = trainer._generate_and_score_completions(generation_batch)
            trainer._buffered_inputs = split_tensor_dict(found, passes)
        return trainer._buffered_inputs[trainer._step % passes]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        trainer: Any = self
        step, world = int(trainer.state.global_step), self.workers.world
        first = self.workers.rank * len(inputs)
        numbers = np.arange(first, first + len(inputs))
        self._taken = inputs
        self._positions = step * self.job.batch_examples + numbers // self.job.samples
        self._numbers = numbers % self.job.samples
        if len(inputs) * world != self.job.batch_examples * self.job.samples:
            raise RuntimeError(
                f"{len(inputs)} replies on each of {world} workers are no round of {self.job.batch_examples} prompts"
            )
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        self._keep(step, output)
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [row["prompt_ids"] for row in self._taken], None, {}

    def draw(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Token ids of a reply to each prompt, with the token that ended it, by transformers' generate."""
        trainer: Any = self
        job, device = self.job, self.workers.device
        padding, length = int(trainer._tokenizer.pad_token_id), max(map(len, prompt_ids))
        padded = torch.tensor([[padding] * (length - len(row)) + row for row in prompt_ids], device=device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompt_ids], device=device)
        row_keys = torch.from_numpy(sampling.keys(job.seed, self._positions, self._numbers)).to(device)
        ends = list(trainer.eos_token_ids)
        cut = job.sharding == "fsdp2" and self.workers.world > 1
        if cut and isinstance(trainer.model, PeftModel):
            # PEFT generates by the model inside, past the root that gathers the outermost weights.
            register_fsdp_forward_method(trainer.model, "generate")
        with (
            unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
            torch.no_grad(),
            trainer.accelerator.autocast(),
        ):
            whole = model.generate(
                input_ids=padded,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    max_new_tokens=job.max_new_tokens, do_sample=False, use_cache=True, pad_token_id=padding, eos_token_id=ends,
                    disable_compile=True,
                ),
                logits_processor=sampling.processors(job, row_keys, length),
                synced_gpus=cut,  # sharded weights are gathered by all workers alike
            )  # fmt: skip
        found = []
        for row in whole[:, length:].tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            found.append(row[: min(stop + 1, job.max_new_tokens)])
        return found

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        """float32[all replies, functions]: the scores, NaN where one does not apply."""
        trainer: Any = self
        ends = set(trainer.eos_token_ids)
        batch = verify.Batch(
            prompts,
            [completion[0]["content"] for completion in completions],
            [row["reference"] for row in inputs],
            [ids[-1] in ends for ids in completion_ids_list],
        )
        found = {name: scorer(batch) for name, scorer in self.scorers.items()}
        own = np.stack([scores.values for scores in found.values()], axis=1)
        self._replies, self._lengths = batch, [len(ids) for ids in completion_ids_list]
        self._scores = found
        gathered: torch.Tensor = trainer.accelerator.gather(torch.tensor(own, dtype=torch.float32, device=self.workers.device))
        return gathered

    def _keep(self, step: int, output: dict[str, Any]) -> None:
        """Put a round's replies on file, those of all workers together."""
        rows = []
        offsets = self.examples.offsets
        dataset_rows = self.order[self._positions]
        epochs = self.mixture.locate(self._positions).epoch
        advantages = output["advantages"].float().cpu().tolist()
        for index, row in enumerate(dataset_rows.tolist()):
            source = int(np.searchsorted(offsets, row, side="right")) - 1
            scores = {name: float(found.values[index]) for name, found in self._scores.items()}
            applied = {name: score for name, score in scores.items() if score == score}
            rows.append(
                {
                    "step": step,
                    "position": int(self._positions[index]),
                    "input": self.mixture.names[source],
                    "row": int(row - offsets[source]),
                    "epoch": int(epochs[index]),
                    "id": self.examples.ids[source][int(row - offsets[source])].as_py(),
                    "sample": int(self._numbers[index]),
                    "reply": self._replies.replies[index].encode("utf-8", "replace").decode(),
                    "tokens": self._lengths[index],
                    "finished": bool(self._replies.finished[index]),
                    "rewards": {name: applied.get(name) for name in scores},
                    "reward": sum(self.job.rewards[name].weight * score for name, score in applied.items()),
                    "advantage": advantages[index],
                    "failed": [
                        f"{name}: {found.failures[index]}" for name, found in self._scores.items() if index in found.failures
                    ],
                }
            )
        gathered = self.workers.gather(rows)

        def write() -> None:
            table = pa.Table.from_pylist([row for part in gathered for row in part], schema=completions(self.job))
            stream = io.BytesIO()
            pq.write_table(table, stream, compression="zstd")
            storage.write_bytes(storage.join(self.directory, "rounds", f"{step:08d}.parquet"), stream.getvalue())

        self.workers.on_first(write)

    def announcement(self, planned: dict[str, Any]) -> str:
        job = self.job
        parts = ", ".join(f"{name} {part['samples']} ({part['epochs']:g} epochs)" for name, part in planned["mixture"].items())
        return (
            f"{planned['steps']} steps of {job.batch_examples} prompts = {planned['epochs']:g} epochs, {job.samples} replies each "
            f"(up to {job.max_new_tokens} tokens); {parts}"
        )

    def rounds(self) -> Iterator[pa.Table]:
        """The replies on file, round by round."""
        for step in range(0, self.job.planned_steps, self.job.iterations):
            content = storage.read_bytes(storage.join(self.directory, "rounds", f"{step:08d}.parquet"))
            yield pq.read_table(io.BytesIO(content))

    def finale(self) -> dict[str, Any]:
        summary = dict(self.workers.share(self.workers.on_first(self.summary)))
        steps, seconds = len(self.follow.curve) or 1, self.follow.seconds
        summary["timings"] = {
            "step_seconds": seconds,
            "tokens_per_second": summary["tokens"] * (steps / self.job.planned_steps) / seconds if seconds else 0.0,
            "workers": self.workers.world,
            "device": self.workers.device.type,
        }
        return summary

    def summary(self) -> dict[str, Any]:
        """What became of the rewards from the first rounds to the last, over all replies on file."""
        names = list(self.job.rewards)
        means: dict[str, list[float]] = {name: [] for name in ("reward", *names)}
        failures: Counter[str] = Counter()
        examples: dict[str, str] = {}
        count = tokens = finished = 0
        alike: list[float] = []
        for table in self.rounds():
            count += table.num_rows
            tokens += int(pc.sum(table["tokens"]).as_py())
            finished += int(pc.sum(table["finished"]).as_py())
            rewards = table["reward"].to_numpy()
            means["reward"].append(float(rewards.mean()))
            groups = rewards.reshape(-1, self.job.samples)
            alike.append(float(np.isclose(groups.std(axis=1), 0).mean()))
            for name in names:
                value = pc.mean(pc.struct_field(table["rewards"].combine_chunks(), name)).as_py()
                means[name] += [] if value is None else [float(value)]
            for said in pc.list_flatten(table["failed"]).to_pylist():
                name = said.partition(":")[0]
                failures[name] += 1
                examples.setdefault(name, said.partition(": ")[2])
        return {
            "algorithm": self.job.algorithm,
            "completions": count,
            "tokens": tokens * self.job.iterations,
            "finished": round(finished / max(1, count), 6),
            "rewards": {name: _ends(values) for name, values in means.items()},
            "zero_variance": _ends(alike),
            "failures": {name: {"count": failures[name], "first": examples[name]} for name in sorted(failures)},
        }

    def write_rows(self, directory: str, taken: Iterator[pa.Table]) -> None:
        """One row a reply; its first columns are those of a sample."""
        if 0 not in shards.committed_units(directory):
            writer, rows = shards.UnitWriter(directory, 0), 0
            for table in self.rounds():
                writer.write(table)
                rows += table.num_rows
            writer.commit(Ledger(created=rows, kept=rows))


def _ends(values: list[float]) -> dict[str, float | None]:
    """Means over the first and the last rounds."""
    if not values:
        return {"first": None, "last": None}
    edge = min(_EDGE, len(values))
    return {"first": round(float(np.mean(values[:edge])), 6), "last": round(float(np.mean(values[-edge:])), 6)}


def completions(job: GrpoJob) -> pa.Schema:
    """The schema of replies on file: a sample's columns, then the reply and what it was worth."""
    return pa.schema(
        [
            *samples.SAMPLES,
            pa.field("sample", pa.int32(), nullable=False),  # number in the prompt's group
            pa.field("reply", pa.string(), nullable=False),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("finished", pa.bool_(), nullable=False),  # false: cut at `max_new_tokens`
            pa.field("rewards", pa.struct([pa.field(name, pa.float32()) for name in job.rewards])),  # null: does not apply
            pa.field("reward", pa.float32(), nullable=False),  # their weighted sum
            pa.field("advantage", pa.float32(), nullable=False),
            pa.field("failed", pa.list_(pa.string())),  # `name: error` of the functions that could not digest the reply
        ]
    )


class _Grpo(_Rollouts, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO trainer on planned prompts."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *arguments: Any, **named: Any) -> Any:
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, *arguments, **named)
        return self.draw(prompt_ids), None


class _Rloo(_Rollouts, RLOOTrainer):  # type: ignore[misc]
    """TRL's RLOO trainer on planned prompts."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *arguments: Any, **named: Any) -> Any:
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, *arguments, **named)
        return self.draw(prompt_ids)


def _curves(job: GrpoJob) -> dict[str, str]:
    named = {f"rewards/{name}/{kind}": f"reward_{name}{suffix}" for name in job.rewards for kind, suffix in _KINDS}
    return {**_CURVES, **named}


_KINDS = (("mean", ""), ("std", "_deviation"))
_CURVES = {
    "grad_norm": "gradient_norm",
    "reward": "reward",
    "reward_std": "reward_deviation",
    "frac_reward_zero_std": "zero_variance",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "reply_tokens",
    "completions/clipped_ratio": "cut_replies",
    "clip_ratio/region_mean": "clipped",
    "sampling/sampling_logp_difference/mean": "sampler_difference",
}


def run(job: GrpoJob, directory: str, workers: Workers) -> dict[str, Any]:
    """Train by rewards and export to `directory`/model (adapters merged) and `directory`/adapter.

    Called again after a crash it goes on from the last checkpoint with the same replies; when finished it returns the result
    on file. Raises JobCancelled, ValueError for inputs without a usable prompt, for a batch that does not divide, and for
    vLLM without CUDA.
    """
    root = storage.join(directory, "checkpoints")
    rounds = storage.join(directory, "rounds")
    finished = finetune.finished(directory, root, workers)
    if finished is None:
        _check(job, workers)
        finished = _train(job, directory, root, workers)
    workers.on_first(lambda: storage.delete(rounds))
    return finished


def _check(job: GrpoJob, workers: Workers) -> None:
    """Refuse what cannot be done here, before anything is loaded. Raises ValueError."""
    lora.check(job)
    if job.vllm is not None and workers.device.type != "cuda":
        raise ValueError(
            "vllm needs CUDA, and this worker has none; leave `vllm` out, and transformers draws the replies, or train on GPUs"
        )
    if job.batch_examples % workers.world:
        raise ValueError(f"a step of {job.batch_examples} prompts does not divide among {workers.world} workers, one group each")
    share = job.batch_examples * job.samples // workers.world
    if job.loss == "bnpo" and (workers.world > 1 or (job.micro_batch_examples or share) < share):
        raise ValueError(
            "loss: bnpo is a mean over the tokens of one forward pass of one worker, so the batch must not be cut: leave "
            "micro_batch_examples out and train on one worker, or use dapo, the mean over all tokens of the global batch"
        )


def _train(job: GrpoJob, directory: str, root: str, workers: Workers) -> dict[str, Any]:
    def prepare() -> tuple[Any, ...]:
        model, tokenizer = lora.load_base(job.model, job.lora, workers.device), models.load_tokenizer(job.model)
        models.as_chat(tokenizer, model, job.chat_template)
        model.config.use_cache = False
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of {job.model} has no padding token, which a batch of replies needs")
        scorers = {name: _function(check, workers) for name, check in job.rewards.items()}
        examples = encode(job, tokenizer)
        reference = models.load(job.model) if job.beta and job.lora is None else None
        if reference is not None:
            reference.config.use_cache = False
        return model, tokenizer, scorers, examples, _settled(job, examples), reference

    model, tokenizer, scorers, examples, job, reference = workers.together(prepare)
    mixture = examples.mixture(job)
    generation = model.generation_config
    follow = _Follow(workers, job, root, _curves(job), examples)
    grpo = job.algorithm == "grpo"
    kind: Any = _Grpo if grpo else _Rloo
    trainer = kind(
        model=model,
        reward_funcs=[_named(name) for name in job.rewards],
        args=(GRPOConfig if grpo else RLOOConfig)(**_arguments(job, workers, finetune.output_directory(root))),
        train_dataset=finetune.dataset(examples),
        processing_class=tokenizer,
        callbacks=[follow],
        peft_config=lora.adapter_config(job.lora),
    )
    trainer.job, trainer.workers, trainer.follow, trainer.directory = job, workers, follow, directory
    trainer.mixture, trainer.examples, trainer.scorers = mixture, examples, scorers
    trainer.attend(reference)
    return finetune.complete(trainer, follow, job, examples, mixture, generation, directory, root, workers)


def _settled(job: GrpoJob, examples: Prompts) -> GrpoJob:
    """The job with its steps fixed; epochs count prompts, each of whose rounds is `iterations` steps."""
    if job.steps is not None:
        return finetune.settled(job, examples)
    rounds = finetune.settled(job.model_copy(update={"most_steps": None}), examples).planned_steps
    steps = rounds * job.iterations
    return job.model_copy(update={"steps": min(steps, job.most_steps or steps), "epochs": None})


def _arguments(job: GrpoJob, workers: Workers, output: str) -> dict[str, Any]:
    """The settings of TRL's trainer."""
    replies = job.model_copy(update={"batch_examples": job.batch_examples * job.samples})
    given = finetune.arguments(replies, workers, output)
    del given["max_length"]  # prompts that are too long are set aside before
    given |= {
        "num_generations": job.samples,
        "max_completion_length": job.max_new_tokens,
        "temperature": job.temperature,
        "top_p": job.top_p,
        "top_k": job.top_k,
        "min_p": job.min_p,
        "beta": 0.0,  # TRL would load the reference by the model's name; ours is set afterwards
        "num_iterations": job.iterations,
        "epsilon": job.epsilon,
        "epsilon_high": job.epsilon_high,
        "reward_weights": [check.weight for check in job.rewards.values()],
        "mask_truncated_completions": job.mask_truncated,
        "log_completions": False,
        "save_steps": -(-given["save_steps"] // job.iterations) * job.iterations,  # between rounds
    }
    if job.algorithm == "grpo":
        given |= {
            "loss_type": job.loss or "dapo",
            "scale_rewards": job.scale_rewards or "group",
            "multi_objective_aggregation": job.aggregation,
            "importance_sampling_level": job.importance,
        }
    else:
        given["normalize_advantages"] = job.scale_rewards == "batch"
    if job.vllm is not None:
        given |= {
            "use_vllm": True,
            "vllm_mode": job.vllm.mode,
            "vllm_server_base_url": job.vllm.url,
            "vllm_gpu_memory_utilization": job.vllm.gpu_memory_share,
            "vllm_tensor_parallel_size": job.vllm.tensor_parallel,
            "vllm_max_model_length": job.vllm.max_model_tokens,
            "vllm_enable_sleep_mode": job.vllm.sleep,
        }
    return given


def _named(name: str) -> Callable[..., list[float]]:
    """What TRL calls a reward function by; scores are computed for all of them at once (`_Rollouts._calculate_rewards`)."""

    def function(**_: Any) -> list[float]:
        raise RuntimeError(f"the reward {name} is not computed one by one")

    function.__name__ = name
    return function


def _function(check: Any, workers: Workers) -> verify.Function:
    if not isinstance(check, RewardModelCheck):
        return verify.function_of(check)
    scoring = Scoring(
        str(models.model_directory(check.model)), "reward", check.label, "none", check.max_tokens, check.batch_tokens,
        workers.device.type, None,
    )  # fmt: skip
    threads = torch.get_num_threads()
    scorer = ConversationScorer(scoring, "auto")
    torch.set_num_threads(threads)  # a classifier in a process of its own takes one

    def score(batch: verify.Batch) -> verify.Scores:
        conversations = [
            (*((message["role"], message["content"] or "") for message in prompt), ("assistant", reply))
            for prompt, reply in zip(batch.prompts, batch.replies, strict=True)
        ]
        found = [reply.text for reply in scorer.score(conversations)]
        return verify.Scores(np.array([float(text) if text else np.nan for text in found]), {})

    return score


def encode(job: GrpoJob, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Prompts and reference answers of all inputs.

    A conversation that ends with the assistant is a prompt with that answer; one that ends with the user is a prompt. Those
    without a user's message, too long, refused by the chat template or, where `answer` is set, without one are set aside.
    """
    spool = ArrowSpool(_ENCODED)
    ids: list[pa.Array] = []
    tokens: list[np.ndarray] = []
    aside: Counter[str] = Counter()
    columns = ["id", "messages", *([job.answer] if job.answer is not None else [])]
    for item in job.inputs:
        kept_ids: list[str] = []
        kept_tokens: list[int] = []
        for batch in finetune.rows_of([item.directory], columns):
            held = finetune.held_out(item, batch["id"], job.seed)
            aside["held_out"] += int(held.sum())
            batch = finetune.without_control_tokens(batch.filter(pa.array(~held)), ["messages"], tokenizer, aside)
            rows = batch.to_pydict()
            prompts, references, keys = [], [], []
            for number, (key, messages) in enumerate(zip(rows["id"], rows["messages"], strict=True)):
                replied = bool(messages) and messages[-1]["role"] == "assistant"
                prompt = messages[:-1] if replied else messages
                reference = messages[-1]["content"] if replied else None
                if job.answer is not None:
                    value = rows[job.answer][number]
                    reference = None if value is None else str(value)
                if not prompt or prompt[-1]["role"] == "assistant" or not any(m["role"] == "user" for m in prompt):
                    aside["no_prompt"] += 1
                elif job.answer is not None and reference is None:
                    aside["no_answer"] += 1
                else:
                    prompts.append(prompt)
                    references.append(reference)
                    keys.append(key)
            texts = rendered(tokenizer, prompts, opened=True)
            aside["refused_by_chat_template"] += sum(text is None for text in texts)
            usable = [index for index, text in enumerate(texts) if text is not None]
            taken: dict[str, list[Any]] = {name: [] for name in _ENCODED.names}
            for index, prompt_ids in zip(usable, encoded(tokenizer, [str(texts[index]) for index in usable]), strict=True):
                if len(prompt_ids) > job.max_length:
                    aside["prompt_too_long"] += 1
                    continue
                taken["prompt"].append(prompts[index])
                taken["prompt_ids"].append(prompt_ids)
                taken["reference"].append(references[index])
                kept_ids.append(keys[index])
                kept_tokens.append(len(prompt_ids))
            spool.write(taken)
        ids.append(pa.array(kept_ids, pa.string()))
        tokens.append(np.array(kept_tokens, np.int64))
    return Prompts(spool.finish(), ids, tokens, {name: count for name, count in sorted(aside.items()) if count})
