"""How many tokens any stretch of a text has, as a running count over its characters."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from operators.config import SettingsError

TokenCounts = Callable[[str], np.ndarray]
"""text -> int64[len(text) + 1]; entry j less entry i is the number of tokens of text[i:j], to within one."""

_WINDOW = 1 << 16  # characters that a tokenizer is given at once: bounds its memory
_TENTHS = {"ascii": 3, "other": 5, "whole": 10}
_WHOLE = (  # scripts in which a character is about a token: Thai to Khmer, Kana, Han, Hangul, all beyond the first plane
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3001, 0x30FF), (0x3100, 0x9FFF), (0xAC00, 0xD7AF),
    (0xF900, 0xFAFF), (0xFF00, 0xFFEF), (0x10000, 0x10FFFF),
)  # fmt: skip


def estimate(text: str) -> np.ndarray:
    """Tokens without a tokenizer: .3 an ASCII character (English has 4 to 5 a token, code about 3), 1 a character of
    Chinese and other scripts without spaces, .5 any other."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    weights = np.where(codes < 0x80, _TENTHS["ascii"], _TENTHS["other"]).astype(np.int64)
    if len(codes) and codes.max() >= _WHOLE[0][0]:
        for low, high in _WHOLE:
            weights[(codes >= low) & (codes <= high)] = _TENTHS["whole"]
    counts = np.zeros(len(codes) + 1, np.int64)
    np.cumsum(weights, out=counts[1:])
    return np.asarray(counts // 10)


def counts_of(tokenizer_file: str) -> TokenCounts:
    """Counts by a tokenizer (a Hugging Face `tokenizer.json`). A token counts where it begins, so stretches add up.

    Raises SettingsError when the file is none.
    """
    tokenizer = _load(tokenizer_file)

    def counts(text: str) -> np.ndarray:
        found = np.zeros(len(text) + 1, np.int64)
        start = 0
        while start < len(text):
            end = min(len(text), start + _WINDOW)
            if end < len(text):  # cut where a line ends, so that no word is torn
                end = text.rfind("\n", start + 1, end) + 1 or end
            starts = np.array([first for first, _ in tokenizer.encode(text[start:end], add_special_tokens=False).offsets], np.int64)
            found[start + 1 : end + 1] += np.bincount(starts, minlength=end - start)[: end - start]
            start = end
        return np.asarray(np.cumsum(found))

    return counts


@lru_cache(maxsize=4)
def _load(path: str):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise SettingsError(f"no tokenizer at {path}: name a tokenizer.json, or set `tokenizer: estimate`")
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exception
        raise SettingsError(f"{path} is no tokenizer.json: {error}") from error
