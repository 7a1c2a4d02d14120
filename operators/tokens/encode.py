"""Text to token ids: batches of an Arrow column through a Hugging Face fast tokenizer, long texts cut where no token can span."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from cluster import storage
from operators.tokens import byte_pairs

_CHUNK_CHARACTERS = 1 << 16
_BATCH_CHARACTERS = 1 << 20  # an Encoding costs some 150 bytes a token while it lives
_LOOKBACK = 1 << 12
_KERNEL_BYTES = 4 << 20
_SEAM = re.compile(r"(?:[A-Za-z\u4e00-\u9fff](?=[ \n.,;:!?\u3001\u3002\uff0c\uff01\uff1f\uff1b\uff1a]))")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as stages exchange it: the bytes of `tokenizer.json` and the settings beside it."""

    model: bytes
    settings: dict[str, Any]

    @classmethod
    def load(cls, path: str) -> TokenizerFiles:
        """From a directory that holds `tokenizer.json` (and `tokenizer_config.json`), or from the path of the former.

        Raises FileNotFoundError naming the path.
        """
        model = path if path.endswith(".json") else storage.join(path, "tokenizer.json")
        if not storage.exists(model):
            raise FileNotFoundError(f"no tokenizer at {model}: name a directory that holds tokenizer.json")
        settings = model[: -len("tokenizer.json")] + "tokenizer_config.json" if model.endswith("tokenizer.json") else ""
        found = json.loads(storage.read_bytes(settings)) if settings and storage.exists(settings) else {}
        return cls(storage.read_bytes(model), found)

    def token_id(self, name: str) -> int | None:
        """The id of a special token by its settings key (`eos_token`, `pad_token`), None where it has none."""
        token = self.settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return None if token is None else Tokenizer.from_buffer(self.model).token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """Tokens in all, added ones included."""
        return int(Tokenizer.from_buffer(self.model).get_vocab_size(with_added_tokens=True))


class Encoder:
    """Encodes columns of text. Text that looks like a special token is encoded as ordinary text, never as control.

    A tokenizer whose rules are known goes through `byte_pairs`, whose ids are those of the tokenizers library; every other
    one, and any text that the kernel leaves alone, through the library. Memory is bounded by the batch's text, its ids
    (4 bytes a token), 16 MiB of words met before, and one mebicharacter in the library's own form.
    """

    def __init__(self, model: bytes, *, kernel: bool = True) -> None:
        self._tokenizer = Tokenizer.from_buffer(model)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.kernel = byte_pairs.compiled(json.loads(model)) if kernel else None

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, texts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """(uint32[tokens] of all texts one after the other, int64[texts + 1] offsets). A null text has no tokens."""
        if self.kernel is None:
            ids, counts = self._by_library(texts)
        else:
            parts = [self._by_kernel(piece) for piece in _of_bounded_bytes(texts)]
            ids = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, np.uint32)
            counts = np.concatenate([part[1] for part in parts]) if parts else np.zeros(0, np.int64)
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        return ids, offsets

    def _by_kernel(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        assert self.kernel is not None
        _, offsets, data = texts.buffers()
        where = np.frombuffer(offsets, np.int64, len(texts) + 1, 8 * texts.offset)
        ids, counts = self.kernel.encode(np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8), where)
        left = counts < 0
        if self.kernel.others:
            pattern = "|".join(re.escape(token) for token in self.kernel.others)
            left = left | pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)
        if not left.any():
            return ids, counts
        rows = np.flatnonzero(left)
        theirs, their_counts = self._by_library(texts.take(pa.array(rows)))
        ends, their_ends = np.cumsum(np.maximum(counts, 0)), np.cumsum(their_counts)
        pieces, done = [], 0
        for number, row in enumerate(rows.tolist()):
            end = int(ends[row])
            pieces += [
                ids[done : end - max(0, int(counts[row]))],
                theirs[their_ends[number] - their_counts[number] : their_ends[number]],
            ]
            done = end
            counts[row] = their_counts[number]
        return np.concatenate([*pieces, ids[done:]]), counts

    def _by_library(self, texts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        pieces: list[np.ndarray] = []
        counts = np.zeros(len(texts), np.int64)
        batch: list[str] = []
        rows: list[int] = []
        size = 0
        lengths = pc.fill_null(pc.utf8_length(texts), 0).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(lengths):
            text = texts[row].as_py()
            for piece in [text] if lengths[row] <= _CHUNK_CHARACTERS else cut(text, _CHUNK_CHARACTERS):
                batch.append(piece)
                rows.append(int(row))
                size += len(piece)
                if size >= _BATCH_CHARACTERS:
                    self._flush(batch, rows, pieces, counts)
                    size = 0
        self._flush(batch, rows, pieces, counts)
        return (np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)), counts

    def words(self, texts: pa.Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(uint32[tokens], bool[tokens]: the token begins a word of the pre-tokenizer) of each text; empty ones are left out."""
        for text in texts.to_pylist():
            for piece in cut(text or "", _CHUNK_CHARACTERS):
                encoding = self._tokenizer.encode(piece, add_special_tokens=False)
                if encoding.ids:
                    word = np.array(encoding.word_ids, np.int64)
                    yield np.array(encoding.ids, np.uint32), np.diff(word, prepend=-1) != 0

    def _flush(self, batch: list[str], rows: list[int], pieces: list[np.ndarray], counts: np.ndarray) -> None:
        for row, encoding in zip(rows, self._tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            ids = np.array(encoding.ids, np.uint32)
            pieces.append(ids)
            counts[row] += len(ids)
        batch.clear()
        rows.clear()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The exact text of whole documents' ids, special tokens left out."""
        return str(self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True))


def _of_bounded_bytes(texts: pa.Array | pa.ChunkedArray) -> Iterator[pa.Array]:
    """The column as large strings without nulls, in runs of rows of about 4 MiB."""
    for chunk in texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]:
        column = pc.fill_null(chunk.cast(pa.large_string()), "")
        sizes = np.cumsum(pc.binary_length(column).to_numpy(zero_copy_only=False))
        first = 0
        while first < len(column):
            done = int(sizes[first - 1]) if first else 0
            last = min(int(np.searchsorted(sizes, done + _KERNEL_BYTES)) + 1, len(column))
            yield column.slice(first, last - first)
            first = last


def cut(text: str, size: int) -> list[str]:
    """Pieces of at most `size` characters whose concatenation is the text.

    A cut falls after a letter that a space or a sentence mark follows: the pre-tokenizer always splits there, so the ids
    are those of the whole text. Only where `size` characters hold no such place (a base64 blob, say) is the cut forced.
    """
    pieces, start = [], 0
    while len(text) - start > size:
        end = start + size
        lookback = max(start, end - _LOOKBACK)
        seam = max((match.end() for match in _SEAM.finditer(text, lookback, end)), default=0)
        if seam <= lookback:
            seam = max((match.end() for match in _SEAM.finditer(text, start, end)), default=end)
        pieces.append(text[start:seam])
        start = seam
    pieces.append(text[start:])
    return pieces


def single_threaded() -> None:
    """Keep the tokenizer of this process from starting threads: one Ray task is one CPU."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
