"""n-gram language models by KenLM (Heafield 2011): perplexity of a text as CCNet computes it (Wenzek et al. 2020,
arXiv:1911.00359, section 4.2): 10 to the minus mean log10 probability of its tokens and sentence ends.

A model knows only the tokens it was trained on, so text is normalised and cut as then: words, characters, the pieces of a
SentencePiece model, or those of a `tokenizer.json`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from cluster import storage
from operators.config import SettingsError
from operators.text.analysis import Analysis

_BATCH_CHARACTERS = 1 << 20
# as CCNet's models were trained; the digit is no mistake of ours, and has become 0 before
_PUNCTUATION = {
    **dict.fromkeys("，、", ","), "。": ".", **dict.fromkeys("„”“«»」「《》", '"'), **dict.fromkeys("´’", "'"),
    **dict.fromkeys("∶：", ":"), "？": "?", "！": "!", "（": "(", "）": ")", "；": ";", **dict.fromkeys("–━►", "-"), "—": " - ",
    "．": ". ", "～": "~", "…": "...", "〈": "<", "〉": ">", "【": "[", "】": "]", "％": "%",
}  # fmt: skip

Tokens = Callable[[Sequence[str]], list[str]]
"""Lines of text to lines of tokens with a space between."""


def require_kenlm(where: str) -> None:
    """Raises SettingsError that says how to install KenLM, where it is not."""
    if importlib.util.find_spec("kenlm") is None:
        raise SettingsError(f"{where}: KenLM is not installed: pip install danlu[kenlm] (it builds with a C++ compiler)")


def load(path: str) -> Any:
    """The KenLM model (ARPA or binary) of a local path or URI, cached for the process until the file changes.

    Raises FileNotFoundError when there is none, ValueError when the file is no model.
    """
    if storage.is_remote(path):
        return _load(path, storage.size(path), 0)
    local = str(storage.local_path(path))
    if not os.path.isfile(local):
        raise FileNotFoundError(f"no KenLM model at {path}")
    info = os.stat(local)
    return _load(local, info.st_size, info.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _load(path: str, size: int, mtime_ns: int) -> Any:
    if not storage.is_remote(path):
        return _open(path, path)
    with tempfile.TemporaryDirectory() as directory:  # a mapped file stays readable after it is deleted
        copy = os.path.join(directory, os.path.basename(path))
        with open(copy, "wb") as out, storage.open_input(path) as stream:
            while block := stream.read(8 << 20):
                out.write(block)
        return _open(copy, path)


def _open(local: str, path: str) -> Any:
    import kenlm

    config = kenlm.Config()
    config.show_progress = False
    try:
        return kenlm.Model(local, config)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is no KenLM model: {str(error)[:500]}") from error


def tokens_of(name: str) -> Tokens:
    """`words`, `characters`, `spaces` (split already), or the path of a SentencePiece `.model` or a `tokenizer.json`.

    Raises SettingsError for anything else or where the package for it is missing, FileNotFoundError when the file is absent.
    """
    plain: dict[str, Tokens] = {"words": _words, "characters": _characters, "spaces": list}
    if name in plain:
        return plain[name]
    if not is_tokens_file(name):
        raise SettingsError(
            f"tokens: {name!r} is none of words, characters, spaces, nor the path of a SentencePiece .model or a tokenizer .json"
        )
    return _pieces(name, storage.size(name))


def is_tokens_file(name: str) -> bool:
    return name.endswith((".model", ".json"))


@functools.lru_cache(maxsize=16)
def _pieces(path: str, size: int) -> Tokens:
    data = storage.read_bytes(path)
    if path.endswith(".json"):
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return lambda lines: [
            " ".join(item.tokens) for batch in _batches(lines) for item in tokenizer.encode_batch(batch, add_special_tokens=False)
        ]
    if importlib.util.find_spec("sentencepiece") is None:
        raise SettingsError(
            f"tokens: {path} is read by the package sentencepiece, which is not installed: pip install sentencepiece"
        )
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model: {error}") from error
    return lambda lines: [" ".join(item) for batch in _batches(lines) for item in processor.encode(batch, out_type=str)]


def _batches(lines: Sequence[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    size = 0
    for line in lines:
        if size > _BATCH_CHARACTERS:
            batches.append([])
            size = 0
        batches[-1].append(line)
        size += len(line)
    return batches


def _characters(lines: Sequence[str]) -> list[str]:
    return [" ".join("".join(line.split())) for line in lines]


def _words(lines: Sequence[str]) -> list[str]:
    found = Analysis.of(pa.array(lines, pa.large_string()))
    words = found.words
    offsets = np.zeros(len(found) + 1, np.int64)
    out = np.empty(int(words.length.sum()) + len(words.length) + 1, np.uint8)
    _join(found.data, words.first, words.last, words.start, words.length, out, offsets)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(out[: offsets[-1]])]
    return list(pa.Array.from_buffers(pa.large_string(), len(found), buffers).to_pylist())


@numba.njit(cache=True, nogil=True)
def _join(data, first, last, start, length, out, offsets):  # type: ignore[no-untyped-def]
    used = 0
    for row in range(len(first)):
        for word in range(first[row], last[row]):
            if word > first[row]:
                out[used] = 32
                used += 1
            for i in range(start[word], start[word] + length[word]):
                out[used] = data[i]
                used += 1
        offsets[row + 1] = used


@functools.cache
def _table() -> dict[int, str | None]:
    table: dict[int, str | None] = {ord(key): value for key, value in _PUNCTUATION.items()}
    for point in range(0x20000):  # marks and digits beyond are none of any script in use
        category = unicodedata.category(chr(point))
        if category == "Mn":
            table[point] = None
        elif category == "Nd":
            table[point] = "0"
    table.update(dict.fromkeys([*range(32), *range(127, 160)], None))
    return table


def normalise(text: str) -> str:
    """CCNet's form of a text: lower case, no accents, digits as 0, punctuation in ASCII, no control characters (line feeds
    are among them)."""
    text = text.strip().lower()
    return (text if text.isascii() else unicodedata.normalize("NFD", text)).translate(_table())


def perplexities(model: Any, texts: Sequence[str], tokens: Tokens, by_line: bool, ccnet_form: bool) -> np.ndarray:
    """float64[texts], rounded to 3 decimals; nan for a text without a character that is no white space.

    With `by_line` each line that holds more than white space is a sentence, otherwise the whole text is one.
    """
    lines: list[str] = []
    counts = []
    for text in texts:
        pieces = [line for line in text.split("\n") if line and not line.isspace()] if by_line else [text]
        pieces = [normalise(line) for line in pieces] if ccnet_form else [" ".join(line.split("\n")) for line in pieces]
        lines += pieces
        counts.append(len(pieces))
    scores, lengths = np.zeros(len(lines)), np.zeros(len(lines), np.int64)
    for row, line in enumerate(tokens(lines)):
        size = len(line.split())
        if size:
            scores[row], lengths[row] = model.score(line), size + 1
    owner = np.repeat(np.arange(len(texts)), counts)
    score, length = np.bincount(owner, scores, len(texts)), np.bincount(owner, lengths, len(texts))
    with np.errstate(over="ignore"):
        mean = np.divide(-score, length, out=np.full(len(texts), np.nan), where=length > 0)
        return np.round(10.0**mean, 3)
