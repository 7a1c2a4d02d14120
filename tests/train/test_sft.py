"""Supervised fine-tuning: loss on assistant tokens only, mixtures, adapters and their merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from peft import PeftModel

from operators import tables
from tests.train.conftest import conversations, write_rows
from train import checkpoint, models, samples, sft
from train.errors import JobCancelled
from train.loader import IGNORE
from train.parallel import Workers
from train.settings import RowsInput
from train.settings_finetune import LoraSettings, SftJob


def job(model: str, chats: str, general: str, **changes: Any) -> SftJob:
    values = {
        "model": model,
        "inputs": [
            RowsInput(name="chats", directory=chats, weight=0.9),
            RowsInput(name="general", directory=general, weight=0.1),
        ],
        "steps": 8, "learning_rate": 1e-2, "lora": LoraSettings(rank=8), "max_length": 128, "checkpoint_every": 3,
    }  # fmt: skip
    return SftJob(**{**values, **changes})


@pytest.fixture(scope="module")
def chat_tokenizer(small_model: str) -> Any:
    tokenizer, model = models.load_tokenizer(small_model), models.load(small_model)
    models.as_chat(tokenizer, model)
    return tokenizer


def expected(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, put together piece by piece."""
    ids: list[int] = []
    labels: list[int] = []

    def add(text: str, loss: bool) -> None:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(piece)
        labels.extend(piece if loss else [IGNORE] * len(piece))

    for message in messages:
        own = message["role"] == "assistant"
        add(f"<|im_start|>{message['role']}\n", False)
        add(message["content"].strip() + "<|im_end|>", own)
        add("\n", False)
    return ids, labels


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "What glows?"}, {"role": "assistant", "content": "The copper glows."}],
        [{"role": "user", "content": "什么会发光？"}, {"role": "assistant", "content": "炉火里的铜会发光，𠮷。"}],
        [
            {"role": "system", "content": "你是炼丹炉。"},
            {"role": "user", "content": "第一问\n换行"},
            {"role": "assistant", "content": "  答：甲。\n\n乙。 "},
            {"role": "user", "content": "Again, in English 🙂"},
            {"role": "assistant", "content": "\nA. 🔥 B."},
        ],
    ],
)
def test_every_assistant_token_has_loss_and_no_other(chat_tokenizer: Any, messages: list[dict[str, str]]) -> None:
    [(ids, labels)] = sft.encode_conversations(chat_tokenizer, [messages], [None])
    assert (ids, labels) == expected(chat_tokenizer, messages)
    replies = [m["content"].strip() + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert chat_tokenizer.decode([label for label in labels if label != IGNORE]) == "".join(replies)


def test_tools_are_shown_to_the_model_and_have_no_loss(chat_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "天气？"}, {"role": "assistant", "content": "晴。"}]
    tools = '[{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {}}}]'
    [(ids, labels), (plain, _)] = sft.encode_conversations(chat_tokenizer, [messages] * 2, [tools, None])
    assert '"name": "weather"' in chat_tokenizer.decode(ids)
    assert chat_tokenizer.decode([label for label in labels if label != IGNORE]) == "晴。<|im_end|>"
    assert "weather" not in chat_tokenizer.decode(plain)


def test_rows_without_a_token_to_learn_are_set_aside_and_counted(small_model: str, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = conversations(4)
    rows[0]["messages"] = rows[0]["messages"][:1]
    rows[1]["messages"][0]["content"] = "很长 " * 500
    rows[2]["messages"][1]["content"] = "spoof <|im_end|> <|im_start|>user"
    directory = write_rows(tmp_path / "chats" / "f0", "self_instruct", rows, tables.CONVERSATIONS)
    settings = job(small_model, directory, directory, inputs=[RowsInput(name="chats", directory=directory)])
    examples = sft.encode(settings, chat_tokenizer)
    assert examples.set_aside == {"no_assistant_turn": 1, "prompt_too_long": 1, "special_token_in_text": 1}
    assert [part.to_pylist() for part in examples.ids] == [["chat-3"]]


@pytest.fixture(scope="module")
def trained(small_model: str, chats: str, general: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run") / "chat" / "f0"
    torch.set_num_threads(1)
    return directory, sft.run(job(small_model, chats, general, steps=20), str(directory), Workers())


def test_the_loss_falls_and_the_mixture_is_as_asked(trained: tuple[Path, dict[str, Any]]) -> None:
    _, result = trained
    losses = [point["loss"] for point in result["curve"]]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert result["mixture"]["general"]["samples"] == pytest.approx(16, abs=1)
    assert 0 < result["trainable_parameters"] < 0.2 * result["parameters"]


def test_the_merged_model_says_what_base_and_adapter_say(trained: tuple[Path, dict[str, Any]], small_model: str) -> None:
    directory, _ = trained
    merged = models.load(str(directory / "model")).eval()
    base = models.load(small_model).eval()
    adapted = PeftModel.from_pretrained(models.load(small_model), str(directory / "adapter")).eval()
    ids = models.load_tokenizer(str(directory / "model"))("炉火 The furnace", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, found, before = (m(ids).logits for m in (adapted, merged, base))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > 0.1


def test_the_export_can_chat_and_stops_at_the_end_of_its_turn(trained: tuple[Path, dict[str, Any]]) -> None:
    directory, _ = trained
    tokenizer, model = models.load_tokenizer(str(directory / "model")), models.load(str(directory / "model"))
    assert tokenizer.chat_template == models.CHAT_TEMPLATE
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    assert model.config.use_cache is True


def test_a_stopped_run_goes_on_with_the_same_losses(
    trained: tuple[Path, dict[str, Any]], small_model: str, chats: str, general: str, tmp_path: Path
) -> None:
    _, reference = trained
    settings = job(small_model, chats, general, steps=20)
    with pytest.raises(JobCancelled, match="stopped after step 7"):
        sft.run(settings, str(tmp_path / "run"), Workers(report=lambda done, *_: done == 7))
    found = checkpoint.latest(str(tmp_path / "run" / "checkpoints"))
    assert found is not None
    assert found[0] == 7
    resumed = sft.run(settings, str(tmp_path / "run"), Workers())
    assert [p["step"] for p in resumed["curve"]] == list(range(1, 21))
    losses = [[point["loss"] for point in result["curve"]] for result in (resumed, reference)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert samples.read_result(str(tmp_path / "run")) == resumed


def test_the_first_loss_is_the_mean_over_all_assistant_tokens_of_the_batch(
    trained: tuple[Path, dict[str, Any]], small_model: str, chats: str, general: str, chat_tokenizer: Any
) -> None:
    _, result = trained
    settings = job(small_model, chats, general, steps=20)
    examples = sft.encode(settings, chat_tokenizer)
    draw = examples.mixture(settings).locate(torch.arange(8).numpy())
    rows = examples.table.take(pa.array(draw.row + examples.offsets[draw.source])).to_pylist()
    model = models.load(small_model).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:], dtype=torch.long)
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
            count += int((labels != IGNORE).sum())
    assert result["curve"][0]["loss"] == pytest.approx(total / count, abs=1e-4)
