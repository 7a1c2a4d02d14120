"""A model takes the ids of an extended tokenizer: old logits stay, new rows are the means of the old pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from operators.tokens import extend
from operators.tokens.encode import Encoder
from tests.train import group
from tests.train.conftest import SHAPE, documents, pack
from train import embeddings, models, pretrain
from train.parallel import Workers
from train.settings import ModelShape, ParallelSettings, PretrainJob, RowsInput


@pytest.fixture(scope="module")
def tokenizers(bpe: Path) -> tuple[bytes, bytes]:
    old = bpe.read_bytes()
    texts = pa.array([row["text"] for row in documents(60)], pa.large_string())
    merges = extend.learn(Encoder(old), json.loads(old), [texts], 20, min_frequency=2, max_token_bytes=40)
    return old, json.dumps(extend.extended(json.loads(old), merges)).encode()


@pytest.mark.parametrize("tied", [True, False])
def test_old_logits_stay_and_new_rows_are_means_of_the_old_pieces(tokenizers: tuple[bytes, bytes], tied: bool) -> None:
    old, new = tokenizers
    before = Encoder(old)
    shape = ModelShape(**SHAPE, tie_embeddings=tied)
    model = models.create(models.configuration(shape, before.vocab_size, 32, 0, 1), 3).eval()
    ids = torch.from_numpy(before.encode(pa.array(["The furnace 丹炉"]))[0].astype(np.int64))[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert embeddings.extend(model, old, new) == Encoder(new).vocab_size - before.vocab_size > 0
        found = model(input_ids=ids).logits
    assert model.config.vocab_size == Encoder(new).vocab_size
    torch.testing.assert_close(found[..., : before.vocab_size], expected, rtol=0, atol=1e-6)
    weight = model.get_output_embeddings().weight
    for token, parts in embeddings.pieces(old, new).items():
        assert len(parts) > 1
        torch.testing.assert_close(weight[token], weight[parts].mean(0))
        names = json.loads(new)["model"]["vocab"]
        by_id = {number: name for name, number in names.items()}
        assert "".join(by_id[part] for part in parts) == by_id[token]


def test_a_tokenizer_that_is_no_extension_is_refused(tokenizers: tuple[bytes, bytes]) -> None:
    _, new = tokenizers
    other = json.loads(new)
    a, b = list(other["model"]["vocab"])[-2:]
    other["model"]["vocab"][a], other["model"]["vocab"][b] = other["model"]["vocab"][b], other["model"]["vocab"][a]
    with pytest.raises(ValueError, match="no extension of the model's own: id"):
        embeddings.pieces(json.dumps(other).encode(), new)


def test_a_corpus_of_another_tokenizer_than_the_models_is_refused_though_it_would_fit(
    tokenizers: tuple[bytes, bytes], small_model: str, tmp_path: Path
) -> None:
    old, _ = tokenizers
    swapped = json.loads(old)
    names = swapped["model"]["vocab"]
    a, b = list(names)[-2:]
    names[a], names[b] = names[b], names[a]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(swapped))
    packed = pack(tmp_path / "tokens" / "f0", file, documents(20), 64)
    job = PretrainJob(inputs=[RowsInput(name="tokens", directory=packed)], model=small_model, steps=1)
    with pytest.raises(ValueError, match="no extension of the model's own"):
        pretrain.run(job, str(tmp_path / "run"), Workers())


def test_pretraining_goes_on_with_more_tokens_than_the_model_had(
    tokenizers: tuple[bytes, bytes], small_model: str, tmp_path: Path
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(tokenizers[1])
    wider = pack(tmp_path / "tokens" / "f0", file, documents(60), 64)
    job = PretrainJob(inputs=[RowsInput(name="tokens", directory=wider)], model=small_model, steps=2)
    result = pretrain.run(job, str(tmp_path / "run"), Workers())
    assert result["curve"][0]["loss"] < 8, "a row at random for each new token would begin at more"
    exported, size = str(tmp_path / "run" / "model"), Encoder(tokenizers[1]).vocab_size
    assert models.load(exported).get_input_embeddings().weight.shape[0] == size == models.load_tokenizer(exported).vocab_size  # type: ignore[union-attr]
    assert size > models.load(small_model).config.vocab_size
    # What was trained without the new tokens goes on with the model as it is.
    again = PretrainJob(inputs=[RowsInput(name="tokens", directory=wider)], model=exported, steps=1)
    config = pretrain._configuration(again, *pretrain._open(again))
    assert config.vocab_size == size


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_grown_embeddings_train_under_every_layout_as_in_one_process(
    tied: bool, packed: str, tokenizers: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """An odd number of tokens, so that neither kind of cut is an even one; stopped once, and exported whole."""
    old, new = tokenizers
    document = json.loads(new)
    if len(document["model"]["vocab"]) % 2 == 0:
        document["model"]["merges"].pop()
        document["model"]["vocab"].popitem()
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(document))
    size = Encoder(file.read_bytes()).vocab_size
    assert size % 2 and size > Encoder(old).vocab_size
    wider = pack(tmp_path / "tokens" / "f0", file, documents(60), 64)
    first = PretrainJob(
        inputs=[RowsInput(name="tokens", directory=packed)],
        model=ModelShape(**SHAPE, tie_embeddings=tied),
        steps=4,
        learning_rate=5e-3,
    )
    pretrain.run(first, str(tmp_path / "base"), Workers())

    def job(**parallel: Any) -> PretrainJob:
        return PretrainJob(
            inputs=[RowsInput(name="tokens", directory=wider)], model=str(tmp_path / "base" / "model"), steps=8,
            learning_rate=2e-3, checkpoint_every=4, parallel=ParallelSettings(**parallel),
        )  # fmt: skip

    alone = pretrain.run(job(), str(tmp_path / "one"), Workers())
    layouts: dict[str, dict[str, Any]] = {"fsdp2": {"sharding": "fsdp2"}, "tensor": {"tensor": 2}}
    plan = [group.entry(job(**layout), tmp_path / name, stop=5) for name, layout in layouts.items()]
    plan += [group.entry(job(**layout), tmp_path / name) for name, layout in layouts.items()]
    stopped, results = (lambda found: (found[:2], found[2:]))(group.run(plan, tmp_path, 2))
    assert all("JobCancelled" in outcome["error"] for outcome in stopped), stopped
    expected = models.load(str(tmp_path / "one" / "model")).state_dict()
    for name, result in zip(layouts, results, strict=True):
        assert [point["loss"] for point in result["curve"]] == pytest.approx([p["loss"] for p in alone["curve"]], abs=1e-4), name
        found = models.load(str(tmp_path / name / "model"))
        assert found.get_input_embeddings().weight.shape[0] == size  # type: ignore[union-attr]
        for key, tensor in found.state_dict().items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-3, rtol=1e-2)
