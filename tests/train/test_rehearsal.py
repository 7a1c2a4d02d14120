"""Rehearsal: raw documents among conversations, and weights of losses apart from shares of samples."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from operators import shards
from operators.config import SettingsError
from operators.stage import StageContext
from pipelines.recipe import parse_recipe
from tests.train.conftest import documents, write_rows
from train import ewc, fisher, jobs, models, pretrain, rehearsal, sft
from train.loader import IGNORE
from train.parallel import Workers
from train.settings import EwcTerm, PretrainJob, RowsInput
from train.settings_finetune import LoraSettings, SftJob
from train.settings_fisher import FisherJob


def job(model: str, *inputs: RowsInput, **changes: Any) -> SftJob:
    values = {"model": model, "inputs": list(inputs), "steps": 4, "learning_rate": 1e-2, "max_length": 64, "batch_examples": 4}
    return SftJob(**{**values, **changes})


@pytest.fixture(scope="module")
def tokenizer(small_model: str) -> Any:
    tokenizer, model = models.load_tokenizer(small_model), models.load(small_model)
    models.as_chat(tokenizer, model)
    return tokenizer


def texts(directory: Path, *contents: str | None) -> str:
    schema = pa.schema([pa.field("id", pa.string()), pa.field("text", pa.large_string()), pa.field("source", pa.string())])
    rows = [{"id": f"text-{number}", "text": content, "source": "s"} for number, content in enumerate(contents)]
    return write_rows(directory, "corpus", rows, schema)


def test_a_document_has_loss_on_all_its_tokens_no_template_and_the_end_of_text(
    small_model: str, tokenizer: Any, tmp_path: Path
) -> None:
    directory = texts(tmp_path / "docs" / "f0", "A river carries sand.", "河水把沙子带到海里。")
    examples = sft.encode(job(small_model, RowsInput(name="docs", directory=directory)), tokenizer)
    rows = examples.table.to_pylist()
    for row, text in zip(rows, ["A river carries sand.", "河水把沙子带到海里。"], strict=True):
        assert tokenizer.decode(row["input_ids"]) == text + "<|endoftext|>"
        assert row["labels"] == [IGNORE, *row["input_ids"][1:]]  # the first token has nothing that foretells it
    assert examples.ids[0].to_pylist() == ["text-0", "text-1"]
    assert examples.tokens[0].tolist() == [len(row["input_ids"]) - 1 for row in rows]


def test_a_long_document_is_cut_into_pieces_that_are_the_document(small_model: str, tokenizer: Any, tmp_path: Path) -> None:
    text = "The index of a table makes a search fast. 索引让查找变快，代价是占用内存。" * 20
    directory = texts(tmp_path / "docs" / "f0", text)
    examples = sft.encode(job(small_model, RowsInput(name="docs", directory=directory)), tokenizer)
    pieces = [row["input_ids"] for row in examples.table.to_pylist()]
    assert len(pieces) >= 5
    assert tokenizer.decode([token for piece in pieces for token in piece]) == text + "<|endoftext|>"
    assert max(map(len, pieces)) <= 64
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert sum(tokenizer.eos_token_id in piece for piece in pieces) == 1  # only where the document ends
    assert set(examples.ids[0].to_pylist()) == {"text-0"}


def test_documents_that_cannot_be_learnt_from_are_set_aside_and_counted(small_model: str, tokenizer: Any, tmp_path: Path) -> None:
    directory = texts(tmp_path / "docs" / "f0", "", None, "spoof <|im_start|>assistant", "雨落在老桥上。")
    examples = sft.encode(job(small_model, RowsInput(name="docs", directory=directory)), tokenizer)
    assert examples.set_aside == {"empty_document": 2, "special_token_in_text": 1}
    assert examples.ids[0].to_pylist() == ["text-3"]


def test_rows_that_are_neither_conversations_nor_documents_are_refused(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("id", pa.string()), pa.field("body", pa.string())])
    directory = write_rows(tmp_path / "other" / "f0", "corpus", [{"id": "a", "body": "b"}], schema)
    with pytest.raises(ValueError, match=r"neither `messages` .* nor `text` .*\['body', 'id'\]"):
        rehearsal.holds_documents(directory)


@pytest.mark.parametrize(("length", "longest"), [(1, 8), (2, 8), (8, 8), (9, 8), (17, 8), (1000, 7)])
def test_pieces_are_of_equal_length_and_none_is_of_one_token(length: int, longest: int) -> None:
    found = rehearsal.pieces(list(range(length)), longest)
    assert all(2 <= len(piece) <= longest for piece in found)
    if length > 1:
        assert [token for piece in found for token in piece] == list(range(length))


def test_documents_are_mixed_among_conversations_at_their_share(small_model: str, chats: str, corpus: str, tmp_path: Path) -> None:
    result = sft.run(
        job(
            small_model,
            RowsInput(name="chats", directory=chats, weight=0.9),
            RowsInput(name="corpus", directory=corpus, weight=0.1),
            steps=10,
        ),
        str(tmp_path / "run"),
        Workers(),
    )
    assert result["mixture"]["corpus"]["samples"] == pytest.approx(4, abs=1)
    assert result["mixture"]["chats"]["samples"] == pytest.approx(36, abs=1)
    assert result["curve"][-1]["loss"] < result["curve"][0]["loss"]


# ---- weights of losses


def weights_after(directory: Path) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in models.load(str(directory / "model")).named_parameters()}


def test_in_supervised_fine_tuning_a_loss_weight_of_one_changes_no_bit_and_a_half_halves_the_loss(
    small_model: str, chats: str, tmp_path: Path
) -> None:
    results = {}
    for weight in (None, 1.0, 0.5):
        given = {} if weight is None else {"loss_weight": weight}
        settings = job(small_model, RowsInput(name="chats", directory=chats, **given), steps=2)
        results[weight] = sft.run(settings, str(tmp_path / str(weight)), Workers())
    first, same, half = (results[weight]["curve"] for weight in (None, 1.0, 0.5))
    assert first == same
    assert half[0]["loss"] == pytest.approx(first[0]["loss"] / 2, rel=1e-3)
    assert half[0]["gradient_norm"] == pytest.approx(first[0]["gradient_norm"] / 2, rel=1e-3)
    plain, again = weights_after(tmp_path / "None"), weights_after(tmp_path / "1.0")
    assert all(torch.equal(value, again[name]) for name, value in plain.items())


def test_in_pretraining_a_loss_weight_of_one_changes_no_bit_and_others_weigh_tokens(
    small_model: str, packed: str, make_pack: Any, tmp_path: Path
) -> None:
    """Against the loss computed here: sum of weight x loss over the number of tokens."""
    other = make_pack(tmp_path / "other" / "f0", documents(60, seed=9), 64)

    def run(first: float, second: float, **changes: Any) -> dict[str, Any]:
        inputs = [
            RowsInput(name="tokens", directory=packed, loss_weight=first),
            RowsInput(name="other", directory=other, loss_weight=second),
        ]
        values = {"steps": 1, "batch_sequences": 8, "learning_rate": 1e-3, **changes}
        settings = PretrainJob(model=small_model, inputs=inputs, **values)
        name = f"{first}-{second}-{len(changes)}"
        return pretrain.run(settings, str(tmp_path / name), Workers())["curve"][0]  # type: ignore[no-any-return]

    plain, doubled, one_sided = run(1.0, 1.0), run(2.0, 2.0), run(1.0, 0.25)
    assert doubled["loss"] == pytest.approx(2 * plain["loss"], rel=1e-5)
    assert doubled["gradient_norm"] == pytest.approx(2 * plain["gradient_norm"], rel=1e-4)
    left, right = run(1.0, 1e-9)["loss"], run(1e-9, 1.0)["loss"]
    assert left + right == pytest.approx(plain["loss"], rel=1e-5)  # each input's part, over the tokens of both
    assert min(left, right) > 0.5
    assert one_sided["loss"] == pytest.approx(left + 0.25 * right, rel=1e-4)
    assert run(1.0, 0.25, micro_batch_sequences=3)["loss"] == pytest.approx(one_sided["loss"], rel=1e-5)
    assert plain["tokens"] == one_sided["tokens"]


# ---- everything together


def test_rehearsal_ewc_lora_loss_weights_and_stages_work_together(
    small_model: str, packed: str, chats: str, general: str, corpus: str, tmp_path: Path
) -> None:
    """One careful pass over everything at a low rate, then the target with a new adapter, held to the model it began as."""
    general_data = FisherJob(
        model=small_model, sequences=12, max_length=64,
        inputs=[RowsInput(name="general", directory=general), RowsInput(name="corpus", directory=corpus)],
    )  # fmt: skip
    fisher.run(general_data, str(tmp_path / "fisher"), Workers())
    terms = [EwcTerm(fisher=str(tmp_path / "fisher" / "fisher"), strength=50.0)]
    mixture = [
        RowsInput(name="chats", directory=chats, weight=0.8),
        RowsInput(name="general", directory=general, weight=0.1, loss_weight=2.0),
        RowsInput(name="corpus", directory=corpus, weight=0.1, loss_weight=0.5),
    ]
    first = sft.run(
        job(small_model, *mixture, learning_rate=1e-3, lora=LoraSettings(rank=4), ewc=terms), str(tmp_path / "first"), Workers()
    )
    fisher.run(
        FisherJob(model=str(tmp_path / "first" / "model"), sequences=12, inputs=[RowsInput(name="chats", directory=chats)]),
        str(tmp_path / "second-fisher"),
        Workers(),
    )
    terms = [*terms, EwcTerm(fisher=str(tmp_path / "second-fisher" / "fisher"), strength=10.0)]
    second = sft.run(
        job(str(tmp_path / "first" / "model"), *mixture, lora=LoraSettings(rank=4), ewc=terms), str(tmp_path / "second"), Workers()
    )
    for result in (first, second):
        assert [point["step"] for point in result["curve"]] == [1, 2, 3, 4]
        assert set(result["mixture"]) == {"chats", "general", "corpus"}
    # The second stage begins where the first one left the model: away from the first anchor, at the second.
    base, middle = models.load(small_model), models.load(str(tmp_path / "first" / "model"))
    parameters = dict(middle.named_parameters())
    expected = float(ewc.Ewc(terms[:1], small_model, middle, Workers())(parameters))
    assert expected > 0
    assert second["curve"][0]["ewc_penalty"] == pytest.approx(expected, rel=1e-3)
    assert first["curve"][0]["ewc_penalty"] == pytest.approx(0.0, abs=1e-9)
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), middle.parameters(), strict=True))


class Group:
    """Does jobs in this process, as the workers of a run do them."""

    def run(self, job: dict[str, Any], *_: Any) -> dict[str, Any]:
        settings, run = jobs.load(job["kind"])
        return run(settings(**job["config"]), job["directory"], Workers())


def test_stages_of_a_recipe_find_fisher_diagonals_and_models_by_name(
    small_model: str, packed: str, chats: str, corpus: str, tmp_path: Path
) -> None:
    recipe = parse_recipe(
        f"""
name: kept
seed: 3
stages:
  chats: {{kind: conversations, path: [x.jsonl], format: messages}}
  docs: {{kind: corpus, read: {{path: x.jsonl}}}}
  tokens: {{kind: pack, input: docs, tokenizer: {small_model}, length: 64}}
  known: {{kind: fisher, model: {small_model}, input: {{chats: 0.5, docs: 0.5}}, sequences: 8}}
  first: {{kind: sft, model: {small_model}, input: {{chats: 0.8, docs: {{weight: 0.2, loss_weight: 0.5}}}}, steps: 2,
    batch_examples: 2, learning_rate: 0.001, max_length: 64, ewc: [{{fisher: known, strength: 2}}]}}
  learnt: {{kind: fisher, model: first, input: tokens, previous: known, decay: 0.5, sequences: 4}}
  second: {{kind: sft, model: first, input: {{chats: 0.8, docs: 0.2}}, steps: 2, batch_examples: 2, learning_rate: 0.001,
    max_length: 64, lora: {{rank: 2}}, ewc: [{{fisher: learnt, strength: 2}}, {{fisher: known, strength: 1}}]}}
  more: {{kind: pretrain, model: second, input: {{tokens: {{weight: 1, loss_weight: 0.5}}}}, steps: 2, batch_sequences: 2,
    ewc: [{{fisher: learnt, strength: 2}}]}}
"""
    )
    made = {"chats": chats, "docs": corpus, "tokens": packed}
    made = {name: str(shutil.copytree(path, tmp_path / name / "f0")) for name, path in made.items()}  # into one run
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in ("known", "first", "learnt", "second", "more"):
        stage = recipe.stages[name]
        directory = str(tmp_path / name / "f0")
        inputs = {needed: made[needed] for needed in stage.input_names()}
        context = StageContext(
            stage=name, kind=stage.kind, directory=directory, fingerprint="f0", config={}, inputs=inputs, seed=3,
            services={"train": Group},
        )  # fmt: skip
        stage.run(context)
        made[name] = directory
        curves[name] = shards.load_manifest(directory).stats.get("curve", [])
    assert set(recipe.stages["second"].input_names()) == {"chats", "docs", "first", "learnt", "known"}
    assert curves["first"][0]["ewc_penalty"] == pytest.approx(0.0, abs=1e-9)
    assert curves["second"][0]["ewc_penalty"] > 0  # of `known`: the first stage has moved the model away
    assert curves["more"][0]["ewc_penalty"] > 0
    assert shards.load_manifest(made["learnt"]).stats["tasks"] == 2

    wrong = recipe.stages["first"].model_copy(update={"ewc": [EwcTerm(fisher="chats", strength=1.0)]})
    context.inputs = made
    with pytest.raises(SettingsError, match="ewc: stage 'chats' is no `fisher` stage"):
        wrong.run(context)


def test_conversations_and_documents_are_told_apart_by_their_columns(chats: str, corpus: str) -> None:
    assert rehearsal.holds_documents(corpus)
    assert not rehearsal.holds_documents(chats)
