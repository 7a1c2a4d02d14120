"""Conversations as a model reads them: its chat template rendered, its tokenizer applied, a batch at a time."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster import storage
from operators.config import SettingsError
from operators.tokens.encode import cut

_BATCH_CHARACTERS = 1 << 20  # an Encoding costs some 150 bytes a token while it lives
_PIECE_CHARACTERS = 1 << 16

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What a tokenizer without a template is given: the length of its marks is counted as text."""

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTokenizer:
    """A fast tokenizer and its chat template. Marks of the template are single tokens where the tokenizer knows them."""

    tokenizer: Any

    def render(self, messages: Sequence[Message], tools: str | None = None, opens_reply: bool = False) -> str:
        """The text of a conversation; `tools` is JSON. Raises ValueError when the template refuses the conversation."""
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": item["role"] or "", "content": item["content"] or ""} for item in messages],
                    tools=json.loads(tools) if tools else None,
                    chat_template=None if self.tokenizer.chat_template else CHATML,
                    tokenize=False,
                    add_generation_prompt=opens_reply,
                )
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def counts(self, texts: Sequence[str]) -> np.ndarray:
        """int64[texts]: tokens. Long texts are cut where no token can span (see tokens.encode)."""
        found = np.zeros(len(texts), np.int64)
        batch: list[str] = []
        rows: list[int] = []
        size = 0
        for row, text in enumerate(texts):
            for piece in [text] if len(text) <= _PIECE_CHARACTERS else cut(text, _PIECE_CHARACTERS):
                batch.append(piece)
                rows.append(row)
                size += len(piece)
                if size >= _BATCH_CHARACTERS:
                    self._count(batch, rows, found)
                    batch, rows, size = [], [], 0
        self._count(batch, rows, found)
        return found

    def _count(self, batch: list[str], rows: list[int], found: np.ndarray) -> None:
        encoded = self.tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        np.add.at(found, rows, [len(item) for item in encoded])

    def ids(self, text: str) -> np.ndarray:
        """int64[tokens] of a rendered text."""
        return np.array(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int64)


def load(path: str) -> ChatTokenizer:
    """The tokenizer of a directory or URI, kept by the process. Raises SettingsError when there is none."""
    if not storage.exists(storage.join(path, "tokenizer.json")):
        raise SettingsError(f"no tokenizer at {path}: name a directory that holds tokenizer.json (and tokenizer_config.json)")
    stamp = "" if storage.is_remote(path) else str(os.stat(storage.local_path(storage.join(path, "tokenizer.json"))).st_mtime_ns)
    return _load(path, stamp)


_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json")


@functools.lru_cache(maxsize=4)
def _load(path: str, stamp: str) -> ChatTokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as directory:
        local = storage.local_path(path) if not storage.is_remote(path) else directory
        if storage.is_remote(path):
            for name in _FILES:
                if storage.exists(storage.join(path, name)):
                    with open(os.path.join(directory, name), "wb") as out:
                        out.write(storage.read_bytes(storage.join(path, name)))
        try:
            if os.path.exists(os.path.join(local, "tokenizer_config.json")):
                tokenizer: Any = AutoTokenizer.from_pretrained(local, trust_remote_code=False, local_files_only=True, use_fast=True)
            else:
                tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(local, "tokenizer.json"))
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path} holds no tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise SettingsError(f"{path}: the tokenizer has no fast form (tokenizer.json)")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return ChatTokenizer(tokenizer)
