"""Shapes, isolation of packed documents, and checkpoints that others load."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from train import models
from train.loader import PackedTokens, TokenLoader
from train.pretrain import packed_logits
from train.settings import ModelShape


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_packed_documents_do_not_see_each_other(packed: str, architecture: str) -> None:
    corpus = PackedTokens(packed)
    shape = ModelShape(architecture=architecture, layers=2, hidden=64, heads=4, kv_heads=2, initializer=0.2)
    model = models.create(models.configuration(shape, corpus.vocab_size, 64, 0, 3), seed=1).eval()
    batch = TokenLoader([corpus], [1.0], 0, ["tokens"]).batch(np.arange(6))
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    with torch.no_grad():
        together = packed_logits(model, ids, positions)
        leaking = model(input_ids=ids, use_cache=False).logits
        pieces = 0
        for row in range(len(ids)):
            starts = [*torch.nonzero(positions[row] == 0).flatten().tolist(), ids.shape[1]]
            for start, end in itertools.pairwise(starts):
                alone = model(input_ids=ids[row : row + 1, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(together[row, start:end], alone, atol=1e-4, rtol=1e-4)
                if start:
                    assert (leaking[row, start:end] - alone).abs().max() > 0.01
                    pieces += 1
    assert pieces > 5


def test_weights_depend_on_the_seed_alone() -> None:
    config = models.configuration(ModelShape(layers=1, hidden=32, heads=2), 100, 16, 0, 1)
    first, second, other = (models.create(config, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (ModelShape(hidden=64, heads=3), r"heads \(3\) must divide hidden \(64\)"),
        (ModelShape(hidden=64, heads=4, kv_heads=3), r"kv_heads \(3\) must divide heads"),
        (ModelShape(vocab=50), "model.vocab is 50, but the tokenizer has 100 tokens"),
        (ModelShape(context=8), "model.context is 8, but packed sequences are 16 tokens long"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(shape: ModelShape, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        models.configuration(shape, 100, 16, 0, 1)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_an_export_loads_in_transformers_with_equal_logits_and_its_tokenizer(tmp_path: Path, bpe: Path, architecture: str) -> None:
    tokenizer = models.wrap_tokenizer(bpe)
    config = models.configuration(
        ModelShape(architecture=architecture, layers=2, hidden=64, heads=4, kv_heads=2), len(tokenizer), 64, 0, 3
    )
    model = models.create(config, 0).eval()
    models.export(model, tokenizer, str(tmp_path / "model"))
    assert models.exists(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    text = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = text("The furnace 炉火慢慢升温", return_tensors="pt")["input_ids"]
    assert text.decode(ids[0]) == "The furnace 炉火慢慢升温"
    assert (text.eos_token, text.pad_token) == ("<|endoftext|>", "<|pad|>")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model at .*nowhere: the directory does not exist"):
        models.load(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        models.load(str(tmp_path / "empty"))
