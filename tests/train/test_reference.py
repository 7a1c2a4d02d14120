"""The reference's log-probabilities: computed once, kept by content, gone on with after a kill, never stale."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from operators import tables
from tests.train.conftest import preferences, write_rows
from tests.train.test_dpo import job
from train import dpo, finetune, models, reference
from train.errors import JobCancelled
from train.lora import load_base
from train.parallel import Workers
from train.settings_finetune import DpoJob, LoraSettings


def settings(model: str, pairs: str, cache: Path, **changes: Any) -> DpoJob:
    return job(model, pairs, **{"lora": None, "steps": 6, "learning_rate": 1e-3, "reference_cache": str(cache), **changes})


def log_probabilities(told: DpoJob) -> tuple[finetune.Examples, dict[str, np.ndarray]]:
    """What `attach` adds, in a process of its own kind: (examples, its two columns)."""
    tokenizer, model = models.load_tokenizer(told.model), models.load(told.model)
    models.as_chat(tokenizer, model)
    examples = dpo.encode(told, tokenizer)
    order = finetune.planned_order(examples, examples.mixture(told), told)
    full = reference.attach(told, model, lambda: model, tokenizer, examples, order, str(told.reference_cache), Workers())
    return full, {name: full.table.column(name).to_numpy() for name in ("ref_chosen_logps", "ref_rejected_logps")}


def units(cache: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path.relative_to(cache)): (path.stat().st_mtime_ns, path.read_bytes()) for path in cache.rglob("*.npy")}


def by_hand(model: Any, row: dict[str, list[int]], reply: str, length: int) -> float:
    """The sum of log-probabilities of one reply, alone in a batch, from whole logits."""
    ids = torch.tensor([(row["prompt_ids"] + row[reply])[:length]])
    with torch.no_grad():
        scores = model(ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
    start = len(row["prompt_ids"]) - 1
    return float(scores[range(start, len(scores)), ids[0, start + 1 :]].sum())


def test_values_are_the_log_probabilities_of_the_replies_and_only_of_pairs_that_are_taken(
    small_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "UNIT", 7)
    told = settings(small_model, pairs, tmp_path, steps=3, max_length=48)
    examples, columns = log_probabilities(told)
    taken = np.unique(finetune.planned_order(examples, examples.mixture(told), told))
    assert 0 < len(taken) < examples.table.num_rows
    model = models.load(small_model).eval()
    for row in range(examples.table.num_rows):
        values = [columns[name][row] for name in ("ref_chosen_logps", "ref_rejected_logps")]
        if row in taken:
            pair = examples.table.slice(row, 1).to_pylist()[0]
            assert values == pytest.approx([by_hand(model, pair, reply, 48) for reply in ("chosen_ids", "rejected_ids")], abs=1e-3)
        else:
            assert np.isnan(values).all()


def test_a_second_run_with_another_loss_computes_nothing_and_more_steps_only_what_they_add(
    small_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "UNIT", 8)
    cache = tmp_path / "cache"
    dpo.run(settings(small_model, pairs, cache, steps=3), str(tmp_path / "first"), Workers())
    before = units(cache)
    assert len(before) == 3
    dpo.run(
        settings(small_model, pairs, cache, steps=3, loss="ipo", beta=0.5, lora=LoraSettings()), str(tmp_path / "second"), Workers()
    )
    assert units(cache) == before
    dpo.run(settings(small_model, pairs, cache, steps=5), str(tmp_path / "third"), Workers())
    after = units(cache)
    assert len(after) == 5
    assert {name: after[name] for name in before} == before
    assert json.loads(next(cache.rglob("reference.json")).read_text())["path"] == small_model


def test_other_weights_other_pairs_another_template_or_length_never_meet_old_values(
    small_model: str, pairs: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    log_probabilities(settings(small_model, pairs, cache))
    first = set(units(cache))

    changed = tmp_path / "changed"
    shutil.copytree(small_model, changed)
    told = settings(str(changed), pairs, cache)
    _, same = log_probabilities(told)
    assert set(units(cache)) == first, "a copy of the model at another place is the same model"
    model, tokenizer = models.load(str(changed)), models.load_tokenizer(str(changed))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    models.export(model, tokenizer, str(changed))
    _, other = log_probabilities(told)
    assert np.nanmax(np.abs(same["ref_chosen_logps"] - other["ref_chosen_logps"])) > 0.01
    found = [set(units(cache)) - first]

    rows = preferences(60)
    rows[5]["chosen"][0]["content"] += "!"
    edited = write_rows(tmp_path / "edited" / "f0", "preferences", rows, tables.PREFERENCES)
    log_probabilities(settings(small_model, edited, cache))
    found.append(set(units(cache)) - first - set.union(*found))
    log_probabilities(settings(small_model, pairs, cache, max_length=64))
    found.append(set(units(cache)) - first - set.union(*found))
    assert [len(new) for new in found] == [len(first)] * 3


def attempt(told: DpoJob, directory: str, after: int) -> None:
    """A run that ends itself by a signal once so many pairs of the reference are done."""

    def report(done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
        if note == "pairs of the reference" and done >= after:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    torch.set_num_threads(1)
    reference.UNIT = 8
    dpo.run(told, directory, Workers(report=report))


@pytest.mark.slow
def test_a_killed_job_goes_on_with_the_units_that_are_left_and_ends_with_the_same_numbers(
    small_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "UNIT", 8)
    told = settings(small_model, pairs, tmp_path / "cache")
    process = multiprocessing.get_context("spawn").Process(target=attempt, args=(told, str(tmp_path / "run"), 16))
    process.start()
    undisturbed = dpo.run(settings(small_model, pairs, tmp_path / "other"), str(tmp_path / "undisturbed"), Workers())
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    half = units(tmp_path / "cache")
    assert len(half) == 2
    resumed = dpo.run(told, str(tmp_path / "run"), Workers())
    whole = units(tmp_path / "cache")
    assert {name: whole[name] for name in half} == half
    assert {name: content for name, (_, content) in whole.items()} == {n: c for n, (_, c) in units(tmp_path / "other").items()}
    assert resumed["curve"] == undisturbed["curve"]


def test_a_stop_keeps_what_is_done_and_damage_is_told(
    small_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "UNIT", 8)
    told = settings(small_model, pairs, tmp_path / "cache")
    with pytest.raises(JobCancelled, match=r"stopped after 8 of \d+ pairs of the reference"):
        dpo.run(told, str(tmp_path / "run"), Workers(report=lambda *_: True))
    (kept,) = (tmp_path / "cache").rglob("*.npy")
    kept.write_bytes(kept.read_bytes()[:90])
    with pytest.raises(ValueError, match=r"\.npy is damaged .* delete it, and it is computed again"):
        dpo.run(told, str(tmp_path / "run"), Workers())


@pytest.mark.parametrize("inside", [False, True], ids=["an adapter's directory", "a model with an adapter in it"])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)], ids=["full", "lora"])
def test_after_an_adapter_that_is_not_merged_the_reference_is_base_and_adapter(
    small_model: str, pairs: str, tmp_path: Path, inside: bool, lora: LoraSettings | None
) -> None:
    start = tmp_path / "start"
    adapter = start / "adapter" if inside else start
    if inside:
        shutil.copytree(small_model, start)
    torch.manual_seed(3)
    model = get_peft_model(models.load(small_model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(str(adapter))
    told = settings(str(start), pairs, tmp_path / "cache", steps=2, lora=lora, learning_rate=1e-4)
    _, columns = log_probabilities(told)
    _, bare = log_probabilities(settings(small_model, pairs, tmp_path / "cache", steps=2))
    assert np.nanmax(np.abs(columns["ref_chosen_logps"] - bare["ref_chosen_logps"])) > 0.1

    result = dpo.run(told, str(tmp_path / "run"), Workers())
    assert result["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result["curve"][0]["margin"] == pytest.approx(0, abs=1e-6)
    assert result["curve"][1]["loss"] < math.log(2)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        before = model.eval()(ids).logits
        after = models.load(str(tmp_path / "run" / "model")).eval()(ids).logits
        if lora is not None:
            stacked = models.load(str(tmp_path / "run" / "adapter")).eval()(ids).logits
            torch.testing.assert_close(stacked, after, atol=1e-5, rtol=1e-5)
    assert (after - before).abs().mean() < 0.5 * (models.load(small_model)(ids).logits - before).abs().mean()


def test_real_pairs_chinese_and_english_start_at_the_reference(small_model: str, data_pack: Path, tmp_path: Path) -> None:
    rows = []
    for name in ("dpo_en_demo", "dpo_zh_demo"):
        for number, line in enumerate((data_pack / "preference" / f"{name}.jsonl").read_text("utf-8").splitlines()[:12]):
            row = json.loads(line)
            prompt = [{"role": {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"]), "content": turn["value"]}
                      for turn in row["conversations"]]  # fmt: skip
            replies = {key: [{"role": "assistant", "content": row[key]["value"]}] for key in ("chosen", "rejected")}
            rows.append(
                {"id": f"{name}-{number}", "prompt": prompt, **replies, "margin": 1.0, "lang": name[4:6], "provenance": None}
            )
    directory = write_rows(tmp_path / "pairs" / "f0", "preferences", rows, tables.PREFERENCES)
    told = settings(small_model, directory, tmp_path / "cache", steps=2, held_out=0.0, max_length=256)
    result = dpo.run(told, str(tmp_path / "run"), Workers())
    assert result["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert result["curve"][0]["chosen_log_probability"] < -50


def test_a_quantised_start_from_an_adapter_is_refused(small_model: str, tmp_path: Path) -> None:
    model = get_peft_model(models.load(small_model), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"starts from a whole model, .* merge it first"):
        load_base(str(tmp_path / "adapter"), LoraSettings(quantize="nf4"), torch.device("cpu"))
