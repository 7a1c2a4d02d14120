"""Shapes, isolation of packed documents, and checkpoints that others load."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from operators.config import SettingsError
from train import attention, models
from train.loader import PackedTokens, TokenLoader
from train.objective import PackedLoss, prepare
from train.settings import ModelShape, PretrainJob

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_width": 32},
    "qwen3_moe": {"experts": 4, "experts_per_token": 2, "expert_intermediate": 48},
}


def shape(architecture: str, **more: Any) -> ModelShape:
    given = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, **ARCHITECTURES[architecture], **more}
    return ModelShape(architecture=architecture, **given)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_documents_do_not_see_each_other(packed: str, architecture: str) -> None:
    corpus = PackedTokens(packed)
    made = shape(architecture, initializer=0.2)
    model = models.create(models.configuration(made, corpus.vocab_size, 64, 0, 3), seed=1).eval()
    batch = TokenLoader([corpus], [1.0], 0, ["tokens"]).batch(np.arange(6))
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    spans = [
        (row, start, end)
        for row in range(len(ids))
        for start, end in itertools.pairwise([*torch.nonzero(positions[row] == 0).flatten().tolist(), ids.shape[1]])
    ]
    with torch.no_grad():
        alone = [model(input_ids=ids[row : row + 1, start:end], use_cache=False).logits[0] for row, start, end in spans]
        leaking = model(input_ids=ids, use_cache=False).logits
        together = PackedLoss(model).logits(ids, positions)
    inner = 0
    for (row, start, end), expected in zip(spans, alone, strict=True):
        torch.testing.assert_close(together[row, start:end], expected, atol=1e-4, rtol=1e-4)
        if start:
            assert (leaking[row, start:end] - expected).abs().max() > 0.01
            inner += 1
    assert inner > 5


def test_weights_depend_on_the_seed_alone() -> None:
    config = models.configuration(ModelShape(layers=1, hidden=32, heads=2), 100, 16, 0, 1)
    first, second, other = (models.create(config, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (ModelShape(hidden=64, heads=3), r"heads \(3\) must divide hidden \(64\), unless head_width is given"),
        (ModelShape(hidden=64, heads=4, kv_heads=3), r"kv_heads \(3\) must divide heads"),
        (ModelShape(vocab=50), "model.vocab is 50, but the tokenizer has 100 tokens"),
        (ModelShape(context=8), "model.context is 8, but packed sequences are 16 tokens long"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(shape: ModelShape, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        models.configuration(shape, 100, 16, 0, 1)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"architecture": "qwen3_moe", "experts": 4}, "qwen3_moe needs experts_per_token, expert_intermediate"),
        ({"experts": 4}, "llama has no experts: leave out experts, or choose qwen3_moe"),
        (
            {"architecture": "qwen3_moe", "experts": 2, "experts_per_token": 3, "expert_intermediate": 8},
            "experts_per_token .3. is more than experts .2.",
        ),
    ],
)
def test_experts_belong_to_a_shape_that_has_them(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelShape(**given)


def test_a_shape_is_read_from_a_small_file_or_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("architecture: qwen3\nlayers: 3\nhidden: 96\nheads: 4\nhead_width: 64\n")
    config = models.configuration(models.read_shape(str(file)), 100, 16, 0, 1)
    assert (config.model_type, config.num_hidden_layers, config.head_dim) == ("qwen3", 3, 64)
    assert models.read_shape("0.1b").hidden == 768
    assert models.read_shape("shape:0.1b") == models.read_shape("0.1b")
    rows = [{"name": "tokens", "directory": "/nowhere"}]
    for written in ("shape:0.1b", str(file)):
        assert PretrainJob(inputs=rows, model=written, steps=1).model == models.read_shape(written)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"no shape at 2b: neither a file nor one of 0\.1b, 0\.6b, 1b"):
        models.read_shape("2b")
    file.write_text("layers: 3\nheds: 4\n")
    with pytest.raises(SettingsError, match=r"mine\.yaml: unknown key 'heds'.*heads"):
        models.read_shape(str(file))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_export_loads_in_transformers_with_equal_logits_and_its_tokenizer(tmp_path: Path, bpe: Path, architecture: str) -> None:
    tokenizer = models.wrap_tokenizer(bpe)
    config = models.configuration(shape(architecture), len(tokenizer), 64, 0, 3)
    model = models.create(config, 0).eval()
    models.export(model, tokenizer, str(tmp_path / "model"))
    assert models.exists(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    text = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = text("The furnace 炉火慢慢升温", return_tensors="pt")["input_ids"]
    assert text.decode(ids[0]) == "The furnace 炉火慢慢升温"
    assert (text.eos_token, text.pad_token) == ("<|endoftext|>", "<|pad|>")
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected)
        packed = PackedLoss(model).logits(ids, torch.arange(ids.shape[1])[None])
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-4)
    models.export(model, tokenizer, str(tmp_path / "trained"))
    saved = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert attention.NAME not in json.dumps(saved), "how it was trained is no part of a model"
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()(ids).logits, expected)


_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
asked = json.load(open(sys.argv[2]))
engine = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True, disable_log_stats=True)
how = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True, detokenize=False)
found = [reply.outputs[0] for reply in engine.generate([{"prompt_token_ids": ids} for ids in asked], how)]
scores = [[step[token].logprob for token, step in zip(reply.token_ids, reply.logprobs)] for reply in found]
print(json.dumps([{"tokens": list(reply.token_ids), "logprobs": score} for reply, score in zip(found, scores)]))
"""


@pytest.mark.slow
def test_vllm_loads_a_trained_model_and_writes_the_same_tokens(tmp_path: Path, bpe: Path, packed: str) -> None:
    """Trained for some steps, exported, then greedy in vLLM against greedy in transformers, with log-probabilities."""
    tokenizer = models.wrap_tokenizer(bpe)
    corpus = PackedTokens(packed)
    made = shape("qwen3", hidden=96, head_width=32, tie_embeddings=False)
    model = models.create(models.configuration(made, corpus.vocab_size, 64, 0, 3), seed=1)
    objective, loader = PackedLoss(model), TokenLoader([corpus], [1.0], 0, ["tokens"])
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(30):
        batch = loader.batch(np.arange(step * 8, step * 8 + 8))
        loss, _ = objective(**prepare(batch, slice(0, 8), torch.device("cpu"), torch.float32))
        (loss / batch.valid_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    models.export(model, tokenizer, str(tmp_path / "model"))
    prompts = [tokenizer(text)["input_ids"] for text in ("The furnace is", "炉火慢慢", "Rain fell on", "每个学生")]
    expected = []
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for ids in prompts:
        with torch.no_grad():
            found = plain.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=3)
            logits = plain(found).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        tokens = found[0, len(ids) :]
        expected.append((tokens.tolist(), logits.gather(1, tokens[:, None])[:, 0]))
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _VLLM, str(tmp_path / "model"), str(tmp_path / "prompts.json")],
        env=environment, capture_output=True, text=True, timeout=500, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    replies = json.loads(done.stdout.splitlines()[-1])
    for reply, (tokens, scores) in zip(replies, expected, strict=True):
        assert reply["tokens"] == tokens
        torch.testing.assert_close(torch.tensor(reply["logprobs"]), scores, atol=1e-3, rtol=1e-3)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model at .*nowhere: the directory does not exist"):
        models.load(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        models.load(str(tmp_path / "empty"))
