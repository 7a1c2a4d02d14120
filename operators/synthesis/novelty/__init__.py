"""How new a text is: the highest ROUGE-L F against everything accepted so far, exact, in any language.

`tokens` defines what a token is, `kernel` counts common subsequences, `index` finds the nearest text of a pool without
looking at most of it, `pool` is what methods use; `embedding` measures newness by meaning instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from operators.synthesis.novelty import kernel
from operators.synthesis.novelty.pool import Admissions, NoveltyPool
from operators.synthesis.novelty.tokens import Vocabulary, tokenize

__all__ = ["Admissions", "NoveltyPool", "Vocabulary", "recall", "rouge_l", "rouge_l_matrix", "tokenize"]


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F of two texts, in [0, 1]; symmetric. 0 when either has no token."""
    common, m, n = _common(a, b)
    return float(kernel.f_measure(common, m, n))


def recall(reference: str, text: str) -> float:
    """The share of the reference's tokens that the text has in the same order (ROUGE-L recall); 1 for an empty reference."""
    common, m, _ = _common(reference, text)
    return round(common / m, 6) if m else 1.0


def rouge_l_matrix(texts: Sequence[str], others: Sequence[str] | None = None) -> np.ndarray:
    """float64[texts, others] of ROUGE-L F between all pairs, zeros where a text has no token; `others` default to `texts`."""
    vocabulary = Vocabulary()
    given = vocabulary.encode(texts)
    beside = given if others is None else vocabulary.encode(others)
    return kernel.all_scores(*given, *beside, len(vocabulary))


def _common(a: str, b: str) -> tuple[int, int, int]:
    """(longest common subsequence, tokens of a, tokens of b)."""
    vocabulary = Vocabulary()
    tokens, offsets = vocabulary.encode([a, b])
    m, n = int(offsets[1]), int(offsets[2] - offsets[1])
    return (int(kernel.common_of_two(tokens[:m], tokens[m:], len(vocabulary))) if m and n else 0), m, n
