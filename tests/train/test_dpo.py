"""Preference alignment: the right reference, the right tokens, held-out pairs left alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from operators.tokens.holdout import is_held_out
from tests.train.conftest import preferences
from tests.train.test_pretrain import taken
from train import dpo, models
from train.parallel import Workers
from train.settings import RowsInput
from train.settings_finetune import DpoJob, LoraSettings


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
