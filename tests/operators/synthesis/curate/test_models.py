"""Operators that need a tokenizer or a model, and benchmark items in conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from operators import registry
from operators.config import SettingsError
from operators.synthesis.curate import chat_tokens
from tests.operators.synthesis.curate.bench import judge, reasons, row, table, talk

TEXTS = ["How does salt keep food from spoiling?", "It draws water out.", "盐为什么能防腐？", "它会吸走水分。", "x y z " * 40]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random causal model with a byte-level tokenizer and a chat template that knows its marks."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = str(tmp_path_factory.mktemp("model"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=marks, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=marks[0], eos_token=marks[1])
    fast.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' and not loop.first and messages[loop.index0 - 1].role == 'user' %}"
        "{{ raise_exception('two users') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path, safe_serialization=True)
    return path


def test_tokens_are_those_of_the_models_own_template(model: str) -> None:
    from transformers import AutoTokenizer

    rows = [
        row(TEXTS[0], TEXTS[1]),
        row(TEXTS[2], TEXTS[3]),
        talk(("user", "a"), ("user", "b"), ("assistant", "c")),
        row("q", TEXTS[4]),
    ]
    verdict = judge("token_length", rows, tokenizer=model, max=60, min_reply=8)
    own = AutoTokenizer.from_pretrained(model)
    expected = []
    for given in (rows[0], rows[1], rows[3]):
        expected.append(len(own.apply_chat_template(given["messages"], tokenize=True, return_dict=True)["input_ids"]))
    assert verdict.scores is not None
    tokens = verdict.scores["tokens"].to_pylist()
    assert [tokens[0], tokens[1], tokens[3]] == expected
    assert tokens[2] == -1
    assert verdict.reason.to_pylist()[2:] == ["no_template", "too_long"]
    assert "two users" in verdict.detail.to_pylist()[2]
    reply = [len(own(text, add_special_tokens=False)["input_ids"]) for text in (TEXTS[1], TEXTS[3])]
    assert verdict.scores["reply_tokens"].to_pylist()[:2] == reply
    assert reasons("token_length", rows[:1], tokenizer=model, min_reply=reply[0] + 1) == ["short_reply"]
    with pytest.raises(SettingsError, match="no tokenizer"):
        reasons("token_length", rows, tokenizer=model + "/nothing")


def test_a_long_text_is_counted_in_pieces_as_in_one(model: str) -> None:
    chat = chat_tokens.load(model)
    text = "It draws water out. " * 20_000
    assert chat.counts([text, "a"]).tolist() == [len(chat.ids(text)), 1]


def test_difficulty_is_the_ratio_of_the_two_losses(model: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [row(TEXTS[0], TEXTS[1]), row(TEXTS[2], TEXTS[3]), talk(("user", "a")), row("q", "")]
    verdict = judge("instruction_difficulty", rows, model=model, device="cpu", max_ifd=None)
    assert verdict.scores is not None
    found = verdict.scores["ifd"].to_pylist()
    assert found[2:] == [None, None]
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)

    def loss(prefix: list[int], answer: list[int]) -> float:
        ids = torch.tensor([prefix + answer])
        with torch.inference_mode():
            logits = lm(ids).logits[0, len(prefix) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))

    for given, ifd in zip(rows[:2], found[:2], strict=True):
        answer = tokenizer(given["messages"][1]["content"], add_special_tokens=False)["input_ids"]
        prompt = tokenizer.apply_chat_template(given["messages"][:1], tokenize=True, add_generation_prompt=True, return_dict=True)
        assert ifd == pytest.approx(loss(prompt["input_ids"], answer) / loss([0], answer), abs=2e-4)
    alone = [judge("instruction_difficulty", [given], model=model, device="cpu").scores["ifd"][0].as_py() for given in rows[:2]]
    assert np.allclose(alone, found[:2], atol=2e-4)
    low, high = sorted(found[:2])
    assert reasons("instruction_difficulty", rows, model=model, device="cpu", min_ifd=high, max_ifd=None).count("too_easy") == 1
    told = reasons("instruction_difficulty", rows, model=model, device="cpu", max_ifd=low)
    assert told == ["question_does_not_help"] * 2 + [None, None]
    assert registry.build({"instruction_difficulty": {"model": model}}).process(table(rows)).table["ifd"].to_pylist() == found


def test_planted_benchmark_items_are_found_in_either_language(data_pack: Path) -> None:
    bench = data_pack / "bench"

    def item(name: str, at: int) -> dict[str, Any]:
        return dict(json.loads((bench / name).read_text("utf-8").splitlines()[at]))

    gsm, code, cmmlu = item("gsm8k_train_1500.jsonl", 7), item("humaneval_164.jsonl", 3), item("cmmlu_dev.jsonl", 0)
    chinese = next(key for key in cmmlu if key.lower() == "question")
    long = next(
        found
        for line in (bench / "cmmlu_dev.jsonl").read_text("utf-8").splitlines()
        if len((found := json.loads(line))[chinese]) > 30
    )
    rows = [
        row("Solve it: " + gsm["question"], "First, ..."),
        row("Give me a hard problem.", "Here is one. " + gsm["question"] + " Think!"),
        row("Complete the code.", "```python\n" + code["prompt"] + code["canonical_solution"] + "\n```"),
        row("请回答：" + long[chinese], "答案是A。"),
        row("出一道题。", "好的，题目如下：" + long[chinese]),
        row("How does salt keep food from spoiling?", "It draws water out of the cells of bacteria."),
        row("盐为什么能防止食物变质？", "它会把细菌细胞里的水分吸出来，使细菌无法生长。"),
    ]
    benchmarks = [
        {"path": str(bench / "gsm8k_train_1500.jsonl"), "fields": ["question"], "name": "gsm8k"},
        {"path": str(bench / "humaneval_164.jsonl"), "fields": ["prompt", "canonical_solution"], "name": "humaneval"},
        {"path": str(bench / "cmmlu_dev.jsonl"), "fields": [chinese], "name": "cmmlu"},
    ]
    verdict = judge("decontaminate", rows, benchmarks=benchmarks)
    assert verdict.reason.to_pylist() == ["gsm8k", "gsm8k", "humaneval", "cmmlu", "cmmlu", None, None]
    assert json.loads(verdict.detail.to_pylist()[0])["item"] == "7"
