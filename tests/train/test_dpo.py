"""Preference alignment: the right reference and tokens, the losses of TRL, the same on one worker and on two."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from operators.tokens.holdout import is_held_out
from tests.train.conftest import preferences
from tests.train.test_pretrain import taken
from train import dpo, finetune, models, reference, samples
from train.parallel import Workers
from train.schedule import Schedule
from train.settings import RowsInput
from train.settings_finetune import DpoJob, DpoSettings, LoraSettings


def job(model: str, pairs: str, **changes: Any) -> DpoJob:
    values = {
        "model": model, "inputs": [RowsInput(name="pairs", directory=pairs)], "steps": 10, "learning_rate": 5e-3,
        "lora": LoraSettings(rank=8), "max_length": 128, "checkpoint_every": 4,
    }  # fmt: skip
    return DpoJob(**{**values, **changes})


@pytest.fixture(scope="module")
def aligned(small_model: str, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run") / "aligned" / "f0"
    torch.set_num_threads(1)
    return directory, dpo.run(job(small_model, pairs), str(directory), Workers())


def test_the_first_step_stands_at_the_reference_and_later_ones_prefer_the_chosen(aligned: tuple[Path, dict[str, Any]]) -> None:
    _, result = aligned
    assert result["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result["curve"][0]["margin"] == 0
    assert result["curve"][-1]["loss"] < 0.6
    assert result["curve"][-1]["margin"] > 0.1


def test_full_training_and_adapters_start_from_the_same_reference(small_model: str, pairs: str, tmp_path: Path) -> None:
    full = dpo.run(job(small_model, pairs, lora=None, steps=2, learning_rate=1e-3), str(tmp_path / "full"), Workers())
    assert full["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert full["curve"][1]["loss"] < full["curve"][0]["loss"]
    assert full["trainable_parameters"] == full["parameters"]


def test_held_out_pairs_are_never_taken(aligned: tuple[Path, dict[str, Any]]) -> None:
    directory, result = aligned
    ids = [row["id"] for row in preferences(60)]
    held = {key for key, out in zip(ids, is_held_out(ids, 0, 0.2), strict=True) if out}
    assert result["set_aside"] == {"held_out": len(held)}
    assert held
    assert not held & {row["id"] for row in taken(directory)}


def test_replies_begin_after_the_opening_of_the_turn_and_end_with_its_end(small_model: str) -> None:
    import pyarrow as pa

    from operators import tables

    tokenizer, model = models.load_tokenizer(small_model), models.load(small_model)
    models.as_chat(tokenizer, model)
    batch = pa.RecordBatch.from_pylist(preferences(2), schema=tables.PREFERENCES)
    prompts, chosen, rejected = dpo.encode_pairs(tokenizer, batch)
    assert tokenizer.decode(prompts[1]) == "<|im_start|>user\n请说第1句<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chosen[1]) == "河水把沙子和泥土从山上带到海里。<|im_end|>"
    assert tokenizer.decode(rejected[0]) == "No.<|im_end|>"


def test_the_merged_model_says_what_base_and_adapter_say(aligned: tuple[Path, dict[str, Any]], small_model: str) -> None:
    directory, _ = aligned
    merged = models.load(str(directory / "model")).eval()
    adapted = PeftModel.from_pretrained(models.load(small_model), str(directory / "adapter")).eval()
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


CLOSING = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""ChatML without a line end after a turn, so that a whole conversation ends where the reply ends, as TRL cuts it."""


@pytest.fixture(scope="module")
def closing_model(small_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small model with a template and an end token with which TRL encodes pairs as Danlu does."""
    path = tmp_path_factory.mktemp("closing") / "model"
    model, tokenizer = models.load(small_model), models.load_tokenizer(small_model)
    tokenizer.chat_template = CLOSING
    tokenizer.eos_token = "<|im_end|>"
    models.export(model, tokenizer, str(path))
    return str(path)


PARITY: dict[str, Any] = {
    "learning_rate": 3e-4, "steps": 3, "held_out": 0.0, "lora": None, "schedule": Schedule(warmup=0, shape="constant"),
}  # fmt: skip


def in_planned_order(settings: DpoJob) -> Dataset:
    """The pairs as text, in the order in which the job takes them."""
    tokenizer = models.load_tokenizer(settings.model)
    examples = dpo.encode(settings, tokenizer)
    order = finetune.planned_order(examples, examples.mixture(settings), settings)
    rows = preferences(60)
    return Dataset.from_list([{key: rows[index][key] for key in ("prompt", "chosen", "rejected")} for index in order])


def of_trl(settings: DpoJob, directory: Path, configuration: Any, trainer: Any, **told: Any) -> list[dict[str, Any]]:
    """The log of TRL's own trainer, as its users run it, on the same pairs in the same order."""
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    if configuration is DPOConfig and settings.lora is None:
        told_trainer = {"ref_model": AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)}
    else:
        told_trainer = {}
    lora = None
    if settings.lora is not None:
        lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    running = trainer(
        model=model,
        args=configuration(
            output_dir=str(directory), max_steps=settings.steps, per_device_train_batch_size=8,
            learning_rate=settings.learning_rate, lr_scheduler_type="constant", max_grad_norm=1.0,
            max_length=settings.max_length, beta=settings.beta,
            train_sampling_strategy="sequential", logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
            gradient_checkpointing=False, disable_tqdm=True, seed=settings.seed, **told,
        ),
        train_dataset=in_planned_order(settings), processing_class=models.load_tokenizer(settings.model), peft_config=lora,
        **told_trainer,
    )  # fmt: skip
    running.train()
    return [entry for entry in running.state.log_history if "loss" in entry]


def agree(ours: dict[str, Any], theirs: list[dict[str, Any]], within: float = 1e-5) -> None:
    assert [point["loss"] for point in ours["curve"]] == pytest.approx([entry["loss"] for entry in theirs], abs=within, rel=within)
    for name, key in (("margin", "rewards/margins"), ("accuracy", "rewards/accuracies")):
        assert [point[name] for point in ours["curve"]] == pytest.approx([entry[key] for entry in theirs], abs=10 * within)


REFERENCED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"lora": LoraSettings(rank=8)}, {}),
    (
        {"loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
    *(({"loss": name}, {"loss_type": [name]}) for name in ("ipo", "hinge", "sigmoid_norm", "nca_pair", "sppo_hard", "aot")),
    *(({"loss": name}, {"loss_type": [name]}) for name in ("aot_unpaired", "apo_zero", "apo_down", "discopop")),
    ({"loss": "robust", "label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    ({"loss": "exo_pair", "label_smoothing": 1e-3}, {"loss_type": ["exo_pair"], "label_smoothing": 1e-3}),
    ({"ld_alpha": 0.5}, {"ld_alpha": 0.5}),
    ({"weighting": True}, {"use_weighting": True}),
    ({"f_divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    ({"f_divergence": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
    (
        {"f_divergence": "alpha_divergence", "f_alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
]


def marked(cases: list[Any], quick: int) -> list[Any]:
    """The first cases run always, the others among the slow tests."""
    return [case if index < quick else pytest.param(*case, marks=pytest.mark.slow) for index, case in enumerate(cases)]


@pytest.mark.parametrize(("ours", "theirs"), marked(REFERENCED, 2))
def test_losses_with_a_reference_are_those_of_trl_run_as_it_is(
    closing_model: str, pairs: str, tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    settings = job(closing_model, pairs, **{**PARITY, **ours})
    agree(
        dpo.run(settings, str(tmp_path / "ours"), Workers()), of_trl(settings, tmp_path / "theirs", DPOConfig, DPOTrainer, **theirs)
    )


FREE: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"loss": "orpo"}, "orpo", {}),
    ({"loss": "simpo", "beta": 2.0, "simpo_gamma": 0.7}, "cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7}),
    (
        {"loss": {"simpo": 1.0, "sft": 0.5}, "label_smoothing": 0.1},
        "cpo", {"loss_type": "simpo", "cpo_alpha": 0.5, "label_smoothing": 0.1},
    ),
    ({"loss": {"cpo": 1.0, "sft": 1.0}}, "cpo", {"loss_type": "sigmoid"}),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "name", "theirs"), marked(FREE, 1))
def test_losses_without_a_reference_are_those_of_trls_experimental_trainers(
    closing_model: str, pairs: str, tmp_path: Path, ours: dict[str, Any], name: str, theirs: dict[str, Any]
) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    configuration, trainer = (ORPOConfig, ORPOTrainer) if name == "orpo" else (CPOConfig, CPOTrainer)
    settings = job(closing_model, pairs, **{**PARITY, **ours})
    result = dpo.run(settings, str(tmp_path / "ours"), Workers())
    agree(result, of_trl(settings, tmp_path / "theirs", configuration, trainer, **theirs))
    assert not (tmp_path / "ours" / "reference").exists()


def test_combinations_that_cannot_be_are_refused_when_the_recipe_is_read() -> None:
    for given, said in (
        (
            {"loss": "sigmoid", "label_smoothing": 0.1},
            "`label_smoothing` belongs to aot, aot_unpaired, cpo, exo_pair, robust, simpo",
        ),
        ({"loss": "robust"}, "`robust` needs `label_smoothing` above 0"),
        ({"loss": {"orpo": 1.0, "sft": 1.0}}, "cannot be joined by sft"),
        ({"loss": {"simpo": 1.0, "sigmoid": 1.0}}, "`simpo` has no reference and cannot be joined by sigmoid"),
        ({"loss": "sft"}, "learns nothing from the rejected replies"),
        ({"loss": "nca_pair", "f_divergence": "forward_kl"}, "`f_divergence: forward_kl` belongs to"),
        ({"simpo_gamma": 0.9}, "`simpo_gamma` belongs to simpo; the loss is sigmoid"),
        ({"loss": "simpo", "ld_alpha": 0.5}, "`ld_alpha` does not go with `simpo`"),
        ({"loss": "aot", "weighting": True}, "`weighting` does not go with aot"),
        ({"loss": {}}, "at least one loss"),
        ({"loss": {"sigmoid": -1.0}}, "a weight above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            DpoSettings(steps=1, learning_rate=1e-4, **given)


def test_a_loss_that_sorts_its_batch_is_refused_where_the_batch_is_cut(small_model: str, pairs: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be one forward pass of one worker"):
        dpo.run(job(small_model, pairs, loss="aot", micro_batch_examples=4), str(tmp_path / "run"), Workers())


TOGETHER: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "lora": {"lora": LoraSettings(rank=8)},
    "combined": {"loss": {"ipo": 0.5, "sft": 1.0}, "micro_batch_examples": 2},
    "orpo": {"loss": "orpo", "micro_batch_examples": 2},
    "simpo": {"loss": {"simpo": 1.0, "sft": 0.5}, "beta": 2.0},
    "sharded": {"sharding": "fsdp2"},
    "sharded lora": {"sharding": "fsdp2", "lora": LoraSettings(rank=8), "loss": {"sigmoid": 1.0, "sft": 0.2}},
    "cut and accumulated": {"sharding": "fsdp2", "micro_batch_examples": 2, "loss": "orpo"},
}


def settings_of(case: str, model: str, pairs: str) -> DpoJob:
    return job(model, pairs, **{**PARITY, **TOGETHER[case]})


def worker_of_two(rank: int, port: int, model: str, pairs: str, directory: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    reference.UNIT = 8
    workers = Workers.here()
    for case in cases:
        dpo.run(settings_of(case, model, pairs), f"{directory}/{case}", workers)
    workers.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_take_the_steps_of_one(small_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(TOGETHER)
    monkeypatch.setattr(reference, "UNIT", 8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (port, small_model, pairs, str(tmp_path / "two"), cases)
    together = torch.multiprocessing.spawn(worker_of_two, given, nprocs=2, join=False)
    alone = {case: dpo.run(settings_of(case, small_model, pairs), str(tmp_path / "one" / case), Workers()) for case in cases}
    while not together.join(timeout=300):
        pass
    for case, one in alone.items():
        two = samples.read_result(str(tmp_path / "two" / case))
        assert two is not None
        for name in ("loss", "margin", "chosen_log_probability"):
            expected = [point[name] for point in one["curve"]]
            assert [point[name] for point in two["curve"]] == pytest.approx(expected, abs=1e-4, rel=1e-5), (case, name)
        ids = torch.arange(5, 60)[None]
        with torch.no_grad():
            said = [models.load(str(tmp_path / number / case / "model")).eval()(ids).logits for number in ("one", "two")]
        torch.testing.assert_close(said[1], said[0], atol=1e-2, rtol=1e-2)
