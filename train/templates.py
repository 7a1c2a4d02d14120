"""Chat templates that say which part of a conversation the model is to write.

Loss belongs on what the model must learn to write: each reply and the token that ends it. Transformers takes that from
`{% generation %}` marks, which hardly any published template has. So a tokenizer's own template is wrapped into a marked
twin: rendered text stays what it was, byte for byte, and the marks are found by rendering the conversation up to each reply
with the opening of the assistant's turn: what follows, up to the token that ends a turn, is the reply. Opening and end are
learned from a short conversation, and the twin is tried on conversations in English and Chinese before it is used.
The model that is exported keeps its own template (`unmarked`).

A base model without a template gets one: by name, by file, or by the special tokens its tokenizer has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages and messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim + '\\n\\n' }}{%- endif %}
{{- 'Tools, as JSON:\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}{{- message['content'] | trim + '<|im_end|>' }}{%- endgeneration %}
{{- '\\n' }}
{%- elif not (tools and loop.first and message['role'] == 'system') %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""ChatML as Danlu's own models have it: contents are trimmed, tools are listed as JSON."""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
"""The format of Llama 3 Instruct (Meta's model card: header, blank line, trimmed content, end of turn)."""

GEMMA = """\
{{- bos_token }}
{%- set system = messages[0]['content'] | trim + '\\n\\n' if messages and messages[0]['role'] == 'system' else '' %}
{%- for message in messages if message['role'] != 'system' %}
{%- if message['role'] == 'assistant' %}
{{- '<start_of_turn>model\\n' }}
{%- generation %}{{- message['content'] | trim + '<end_of_turn>' }}{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- '<start_of_turn>' + message['role'] + '\\n' + (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
"""The format of Gemma's instruction-tuned models; a system prompt opens the first user's turn, as in Gemma 3."""

LLAMA2 = """\
{%- set system = '' %}
{%- if messages and messages[0]['role'] == 'system' %}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{%- endif %}
{%- for message in messages if message['role'] != 'system' %}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- ' ' + message['content'] | trim + ' ' + eos_token }}{%- endgeneration %}
{%- else %}
{{- bos_token + '[INST] ' + ((system if loop.first else '') + message['content']) | trim + ' [/INST]' }}
{%- endif %}
{%- endfor %}"""
"""The format of Llama 2 Chat (Touvron et al. 2023): a BOS before each instruction, an EOS after each reply."""

MISTRAL = """\
{{- bos_token }}
{%- set system = messages[0]['content'] | trim + '\\n\\n' if messages and messages[0]['role'] == 'system' else '' %}
{%- for message in messages if message['role'] != 'system' %}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- ' ' + message['content'] | trim + eos_token }}{%- endgeneration %}
{%- else %}
{{- '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
{%- endif %}
{%- endfor %}"""
"""The format of Mistral Instruct: one BOS, an EOS after each reply; a system prompt opens the first instruction."""

ALPACA = """\
{{- bos_token or '' }}
{%- if messages and messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim + '\\n\\n' }}
{%- else %}{{- 'Below is an instruction that describes a task. Write a response that completes the request.\\n\\n' }}
{%- endif %}
{%- for message in messages if message['role'] != 'system' %}
{%- if message['role'] == 'assistant' %}
{{- '### Response:\\n' }}
{%- generation %}{{- message['content'] | trim + eos_token }}{%- endgeneration %}
{{- '\\n\\n' }}
{%- else %}
{{- '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"""
"""Plain text with headings (after Taori et al. 2023): for base models whose tokenizer has no tokens for turns."""

NAMED: dict[str, tuple[str, tuple[str, ...]]] = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "llama2": (LLAMA2, ()),
    "mistral": (MISTRAL, ()),
    "alpaca": (ALPACA, ()),
}
"""name -> (template with marks, the special tokens it needs and is known by). `<|im_start|>` serves Qwen, Yi and SmolLM."""

_OPEN = "{#- marked twin -#}{% macro own_template(messages, add_generation_prompt) %}"
_CLOSE = "{% endmacro %}"
_TWIN = """\
{%- set whole = own_template(messages, add_generation_prompt) -%}
{%- set mark = namespace(at=0, start=-1) -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set head = own_template(messages[:loop.index0], true) -%}
{%- set mark.start = -1 -%}
{%- for over in OVERS if mark.start < 0 and whole[:head | length - over] == head[:head | length - over] -%}
{%- set mark.start = head | length - over -%}
{%- endfor -%}
{%- set start = mark.start -%}
{%- if start < mark.at -%}
{{- raise_exception('the chat template renders what came before a reply otherwise once the reply is there') -}}
{%- endif -%}
{%- set parts = whole[start:].split(STOP) -%}
{%- set end = start + parts[0] | length + (STOP | length if parts | length > 1 else 0) -%}
{{- whole[mark.at:start] -}}
{%- generation -%}{{- whole[start:end] -}}
{%- if APPEND and end == whole | length and not add_generation_prompt -%}{{- STOP -}}{%- endif -%}{%- endgeneration -%}
{%- set mark.at = end -%}
{%- endif -%}
{%- endfor -%}
{{- whole[mark.at:] -}}"""

_REPLY = "Qzxreplyqzx"


class TemplateRefused(ValueError):
    """The tokenizer's chat template cannot be used for training; says why and what to do."""


def has_marks(template: str) -> bool:
    """True for a template with `{% generation %}` marks."""
    return "endgeneration" in template


def own(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that a tokenizer brings; of several named ones the default."""
    template: Any = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def unmarked(template: str) -> str:
    """The template that a marked twin wraps; any other as it is."""
    if not template.startswith(_OPEN):
        return template
    return template[len(_OPEN) : template.rindex(_CLOSE + _TWIN[:20])]


def prepare(tokenizer: PreTrainedTokenizerBase, chosen: str | None = None) -> str:
    """Give the tokenizer a template with marks and return the text that ends a turn.

    `chosen` is the name of a template here, or a file of one; else the tokenizer's own is wrapped, and one that has none
    gets what its special tokens call for. Raises TemplateRefused.
    """
    template = _chosen(tokenizer, chosen) if chosen is not None else own(tokenizer)
    if template is None:
        template = _by_tokens(tokenizer)
    if not has_marks(template):
        template = marked(tokenizer, template)
    tokenizer.chat_template = template
    _check(tokenizer, template)
    return ending(tokenizer, template)[1]


def ending(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[list[int], str, bool]:
    """(characters by which the opening of a turn goes beyond what stands before a reply, in the last turn and before;
    what ends a turn; whether the template leaves that out after the last reply), learned from a conversation. Openings go
    beyond where they hold the beginning of a thought that templates drop from the reply. Raises TemplateRefused."""
    try:
        return _ending(tokenizer, template)
    except TemplateError as error:
        raise TemplateRefused(f"the chat template fails on a plain question and reply: {error}; give another one") from error


def _ending(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[list[int], str, bool]:
    question = [{"role": "user", "content": "Qzxaskqzx"}]
    reply = [{"role": "assistant", "content": _REPLY}]
    once = _render(tokenizer, template, question + reply)
    if once.count(_REPLY) != 1:
        raise TemplateRefused(f"the chat template does not render a reply once:\n{once}\ngive another one by `chat_template`")
    head = _render(tokenizer, template, question, opened=True)
    twice = _render(tokenizer, template, question + reply + [{"role": "user", "content": "Qzxagainqzx"}])
    overs = sorted({len(head) - _shared(head, text) for text in (once, twice)})
    special = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len, reverse=True)

    def first(text: str) -> str | None:
        found = [(text.find(token), -len(token), token) for token in special if token in text]
        return min(found)[2] if found else None

    after = once.partition(_REPLY)[2]
    stop = first(after)
    missing = stop is None
    if missing:
        stop = first(twice.partition(_REPLY)[2])
    if stop is None:
        raise TemplateRefused(
            f"the chat template ends a turn by no special token, so the model would not learn to stop:\n{once}\n"
            "give another one by `chat_template` (a file, or one of " + ", ".join(NAMED) + ")"
        )
    return overs, stop, missing


def _shared(one: str, other: str) -> int:
    """Characters that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def marked(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The twin of a template that renders the same text and marks the replies (see the module's text). Raises TemplateRefused."""
    overs, stop, missing = ending(tokenizer, template)
    twin = _TWIN.replace("OVERS", str(overs)).replace("STOP", repr(stop)).replace("APPEND", "true" if missing else "false")
    # Jinja drops one newline at the end of a template, which is not the end any more.
    return _OPEN + template.removesuffix("\n") + _CLOSE + twin


def _check(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Try a template on conversations. Raises TemplateRefused where a twin renders other text or marks anything but replies."""
    plain = unmarked(template)
    _, stop, missing = ending(tokenizer, plain)
    for probe in _probes():
        try:
            expected = _render(tokenizer, plain, probe)
        except TemplateError:
            continue  # a template may refuse roles (Gemma has no system prompt); rows of that kind are set aside
        try:
            rendered = _render(tokenizer, template, probe)
        except TemplateError as error:
            raise TemplateRefused(f"{error}; give another template by `chat_template`") from error
        if rendered != expected + (stop if missing and plain != template else ""):
            raise TemplateRefused(
                f"the chat template cannot be given generation marks: it renders\n{expected}\nand with marks\n{rendered}\n"
                "write {% generation %} marks into it, or give another one by `chat_template`"
            )


def _probes() -> list[list[dict[str, str]]]:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    english = [turn("user", "What glows? "), turn("assistant", " The copper <b>glows</b>.\n")]
    chinese = [turn("user", "什么会发光？"), turn("assistant", "<炉火里的铜>会发光。\n\n- 甲")]
    return [english, chinese, english + chinese, [turn("system", "你是炼丹炉。Be brief."), *chinese, *english]]


def _render(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]], opened: bool = False) -> str:
    text: Any = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=opened)
    return str(text)


def _chosen(tokenizer: PreTrainedTokenizerBase, chosen: str) -> str:
    if chosen in NAMED:
        template, needed = NAMED[chosen]
        missing = [token for token in needed if token not in tokenizer.get_vocab()]
        if missing:
            raise TemplateRefused(f"chat_template: {chosen} needs the special tokens {missing}, which the tokenizer does not have")
        return template
    path = Path(chosen)
    if not path.is_file():
        raise TemplateRefused(f"chat_template: {chosen} is neither a file nor one of {', '.join(NAMED)}")
    return path.read_text("utf-8")


def _by_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = tokenizer.get_vocab()
    for template, needed in NAMED.values():
        if needed and all(token in vocabulary for token in needed):
            return template
    raise TemplateRefused(
        "the tokenizer has no chat template and no special tokens for turns (such as <|im_start|> and <|im_end|>); say "
        "`chat_template: alpaca` for turns in plain text, `llama2` or `mistral` for bases of those families, or a file"
    )
