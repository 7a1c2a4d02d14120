"""Chat templates: the tokenizer's own text byte for byte, and loss on what the model writes, for the usual families."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from tests.train.conftest import documents
from train import models, templates

RECORDED = Path(trl.__file__).parent / "chat_templates"
"""Published templates as TRL records them from their models' repositories (Apache-2.0)."""

_SPECIAL = re.compile(r"<[|｜][^<>|｜ ]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>")

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_MARKS = {
    "chatml": CHATML,  # Yi and many others
    "chatml with a default system prompt": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}"
    "{% endif %}" + CHATML,  # as SmolLM2 and Qwen2 have one
    "llama2": re.sub(r"\{%- (end)?generation %\}", "", templates.LLAMA2),
    "mistral": re.sub(r"\{%- (end)?generation %\}", "", templates.MISTRAL),
    "phi4": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
}
"""Formats of families that TRL records no template of."""


def tokenizer(template: str | None, spaces: bool = False, special: str = "") -> PreTrainedTokenizerFast:
    """A BPE of some 600 tokens with the special tokens that a template names; `spaces`: as SentencePiece treats them."""
    inner = Tokenizer(token_models.BPE(byte_fallback=spaces, unk_token="<unk>" if spaces else None))
    inner.pre_tokenizer = (
        pre_tokenizers.Metaspace(prepend_scheme="first") if spaces else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(pieces) if spaces else decoders.ByteLevel()
    alphabet = [] if spaces else pre_tokenizers.ByteLevel.alphabet()
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if spaces else []
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=first, show_progress=False)
    inner.train_from_iterator((row["text"] for row in documents(60)), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    made.add_special_tokens({"additional_special_tokens": sorted(set(_SPECIAL.findall((template or "") + special)))})
    made.chat_template = template
    return made


def written(made: Any, messages: list[dict[str, str]], tools: Any = None) -> list[str]:
    """The stretches of text with loss, token by token."""
    encoded: Any = made.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    runs: list[list[int]] = [[]]
    for token, marked in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if marked:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [made.decode(run) for run in runs if run]


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    opening = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return opening + [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


TALK = turns("What glows?", " The copper <b>glows</b>.\n", "再说一遍", "炉火里的铜会发光。\n\n- 甲 🔥")
RAW = [" The copper <b>glows</b>.\n", "炉火里的铜会发光。\n\n- 甲 🔥"]
TRIMMED = [reply.strip() for reply in RAW]


@pytest.mark.parametrize(
    ("family", "replies", "stop"),
    [
        ("qwen2_5", RAW, "<|im_end|>"),
        ("qwen3_instruct_2507", RAW, "<|im_end|>"),
        ("qwen3", [RAW[0], "<think>\n\n</think>\n\n" + RAW[1]], "<|im_end|>"),
        ("qwen3_5_nothink", TRIMMED, "<|im_end|>"),
        ("llama3", TRIMMED, "<|eot_id|>"),
        ("llama3_1", TRIMMED, "<|eot_id|>"),
        ("llama3_2", TRIMMED, "<|eot_id|>"),
        ("gemma", TRIMMED, "<end_of_turn>"),
        ("gemma3", TRIMMED, "<end_of_turn>"),
        ("deepseekv3", RAW, "<｜end▁of▁sentence｜>"),
        ("deepseek_r1_distill", RAW, "<｜end▁of▁sentence｜>"),
        ("phi3", RAW, "<|end|>"),
        ("phi3_5", RAW, "<|end|>"),
        ("glm4moe", ["\n<think></think>\n" + reply for reply in TRIMMED], "<|user|>"),
        ("lfm2", RAW, "<|im_end|>"),
    ],
)
def test_loss_is_on_replies_and_what_ends_them_for_published_templates(family: str, replies: list[str], stop: str) -> None:
    own = (RECORDED / f"{family}.jinja").read_text("utf-8")
    made = tokenizer(own)
    assert templates.prepare(made) == stop
    assert "".join(written(made, TALK)) == "".join(reply + stop for reply in replies)
    for messages in (TALK, TALK[:2], TALK[:3], turns("你好", "好。", system="你是炼丹炉。")):
        for opened in (False, True):
            try:
                expected = made.apply_chat_template(messages, chat_template=own, tokenize=False, add_generation_prompt=opened)
            except TemplateError:
                continue
            found = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
            # GLM ends no turn by itself: the last one gets the token at which the model stops.
            appended = stop if family == "glm4moe" and messages[-1]["role"] == "assistant" and not opened else ""
            assert found == (expected + appended if not opened or not appended else expected)
    assert templates.unmarked(str(made.chat_template)) == own.removesuffix("\n")


@pytest.mark.parametrize("spaces", [False, True])
@pytest.mark.parametrize(
    ("family", "replies", "stop"),
    [
        ("chatml", RAW, "<|im_end|>"),
        ("chatml with a default system prompt", RAW, "<|im_end|>"),
        ("llama2", [f" {reply} " for reply in TRIMMED], "</s>"),
        ("mistral", [f" {reply}" for reply in TRIMMED], "</s>"),
        ("phi4", RAW, "<|im_end|>"),
    ],
)
def test_templates_without_marks_get_them_whatever_the_tokenizer_does_with_spaces(
    family: str, replies: list[str], stop: str, spaces: bool
) -> None:
    own = WITHOUT_MARKS[family]
    made = tokenizer(own, spaces)
    assert templates.prepare(made) == stop
    for messages in (TALK, turns("你好", "好。", system="你是炼丹炉。")):
        assert made.apply_chat_template(messages, tokenize=False) == made.apply_chat_template(
            messages, chat_template=own, tokenize=False
        )
    joined = "".join(written(made, TALK))
    if spaces:  # decoding drops spaces at its beginning and around special tokens
        assert re.sub(r"\s", "", joined) == re.sub(r"\s", "", "".join(reply + stop for reply in replies))
    else:
        assert joined == "".join(reply + stop for reply in replies)


def test_tools_and_calls_of_tools_are_as_the_own_template_has_them() -> None:
    own = (RECORDED / "qwen2_5.jinja").read_text("utf-8")
    made = tokenizer(own, special="<tool_call>")
    templates.prepare(made)
    call: Any = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "北京"}}}],
    }
    messages: Any = [{"role": "user", "content": "天气？"}, call, {"role": "tool", "content": "晴"}, *turns("x", "晴天。")[1:]]
    tools = [{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {}}}]
    found = made.apply_chat_template(messages, tools=tools, tokenize=False)
    assert found == made.apply_chat_template(messages, tools=tools, chat_template=own, tokenize=False)
    first, second = written(made, messages, tools)
    assert first == '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>'
    assert second == "晴天。<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_a_base_model_is_given_the_template_that_its_special_tokens_call_for(name: str) -> None:
    template, needed = templates.NAMED[name]
    made = tokenizer(None, special="".join(needed))
    assert templates.prepare(made) == needed[-1]
    assert made.chat_template == template
    assert written(made, TALK) == [reply + needed[-1] for reply in TRIMMED]


@pytest.mark.parametrize("name", ["alpaca", "llama2", "mistral"])
def test_a_base_model_without_tokens_for_turns_wants_a_template_by_name(name: str) -> None:
    made = tokenizer(None)
    with pytest.raises(templates.TemplateRefused, match="chat_template: alpaca"):
        templates.prepare(made)
    assert templates.prepare(made, name) == "</s>"
    assert [text.strip(" ") for text in written(made, TALK)] == [
        reply + {"llama2": " "}.get(name, "") + "</s>" for reply in TRIMMED
    ]


def test_what_cannot_be_used_is_refused_with_what_to_do(tmp_path: Path) -> None:
    made = tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    with pytest.raises(templates.TemplateRefused, match="would not learn to stop"):
        templates.prepare(made)
    made = tokenizer(CHATML)
    with pytest.raises(templates.TemplateRefused, match="llama3 needs the special tokens"):
        templates.prepare(made, "llama3")
    with pytest.raises(templates.TemplateRefused, match="neither a file nor one of"):
        templates.prepare(made, str(tmp_path / "absent.jinja"))
    # The opening of a turn stays only while the conversation is open, and something else stands there afterwards.
    made = tokenizer("{{ messages | length }}" + CHATML)
    with pytest.raises(templates.TemplateRefused, match="otherwise once the reply is there"):
        templates.prepare(made)
    (tmp_path / "mine.jinja").write_text(CHATML, "utf-8")
    made = tokenizer(None, special=CHATML)
    assert templates.prepare(made, str(tmp_path / "mine.jinja")) == "<|im_end|>"
    assert written(made, TALK) == [reply + "<|im_end|>" for reply in RAW]


def test_the_exported_model_keeps_its_own_template_and_stops_at_the_end_of_a_turn(small_model: str, tmp_path: Path) -> None:
    made, model = models.load_tokenizer(small_model), models.load(small_model)
    made.chat_template = CHATML
    models.as_chat(made, model)
    assert templates.has_marks(str(made.chat_template))
    models.export(model, made, str(tmp_path / "model"))
    assert models.load_tokenizer(str(tmp_path / "model")).chat_template == CHATML
    assert made.convert_tokens_to_ids("<|im_end|>") in models.load(str(tmp_path / "model")).generation_config.eos_token_id
