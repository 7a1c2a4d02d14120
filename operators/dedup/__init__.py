"""Exact and near-duplicate removal over any number of rows; only fixed-width keys are exchanged, never text.

The two classes load when first used: tasks that import a kernel module do not pay for `ray.data`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from operators.dedup.minhash import ExactDedup, MinHashDedup

__all__ = ["ExactDedup", "MinHashDedup"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from operators.dedup import minhash

        return getattr(minhash, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
