"""Conversations as the text that a model is given, by the chat template that its export carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def rendered(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict[str, str]]], *, opened: bool = False
) -> list[str | None]:
    """The text of each conversation, with the opening of the assistant's turn where it is to answer.

    None for one that the template refuses (some know no system prompt, or want user and assistant to alternate).
    """
    if not conversations:
        return []
    try:
        found: Any = tokenizer.apply_chat_template(list(conversations), tokenize=False, add_generation_prompt=opened)
        return list(found)
    except TemplateError:
        if len(conversations) == 1:
            return [None]
        return [text for conversation in conversations for text in rendered(tokenizer, [conversation], opened=opened)]


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts, which hold all special tokens already."""
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []
