"""Which documents are kept out of training, so that perplexity can be measured on them: a pure function of id and seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from operators.tokens.hashing import hash_strings

_SALT = 0x68_65_6C_64_6F_75_74_00  # "heldout": the draw shares nothing with other draws from the same ids and seed


def is_held_out(ids: pa.Array | pa.ChunkedArray | Sequence[str], seed: int, share: float) -> np.ndarray:
    """bool[documents]: True for about `share` of the ids, whatever batch, order or machine they come in.

    Raising the share keeps every document that was held out before. Raises ValueError unless 0 <= share <= 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"the held-out share must be between 0 and 1, got {share}")
    column = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids, pa.large_string())
    if share == 0.0:
        return np.zeros(len(column), bool)
    limit = int(share * 2.0**64)
    if limit >= 2**64:
        return np.ones(len(column), bool)
    return hash_strings(column, seed ^ _SALT) < np.uint64(limit)
