"""Prompts that begin alike, brought together: an engine computes a common beginning once while it stays in its cache.

`Sweep` orders what waits inside one engine, `PrefixRouter` chooses between engines. Neither changes what is answered,
only when and where.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Generic, TypeVar

import numpy as np

from operators.synthesis.requests import Messages

T = TypeVar("T")

_SPANS = tuple(256 << n for n in range(9))  # characters: beginnings of 256 to 65,536 are told apart
_REMEMBERED = 1 << 14  # beginnings; at most one a span and prompt


def token_key(tokens: Sequence[int]) -> bytes:
    """A key whose byte order is the order of the token ids, so that keys side by side share the longest beginnings."""
    return np.asarray(tokens, dtype=">u4").tobytes()


class Sweep(Generic[T]):
    """What waits for a place in an engine, handed out in sweeps over the keys.

    A sweep hands out in the order of the keys all that had arrived when it began, from the last key handed out upwards
    and then from the lowest; what arrives meanwhile waits for the next one. So prompts with a common beginning follow
    each other, and nothing is overtaken by more than two sweeps (FSCAN for disk heads: Coffman, Klimko, Ryan, "Analysis of
    Scanning Policies for Reducing Disk Seek Times", SIAM J. Comput. 1(3), 1972). Equal keys keep their order of arrival.
    With `ordered` False everything is handed out as it arrived. Not thread-safe.
    """

    def __init__(self, ordered: bool = True) -> None:
        self._ordered = ordered
        self._sweep: deque[tuple[bytes, int, T]] = deque()
        self._arrived: list[tuple[bytes, int, T]] = []
        self._number = itertools.count()
        self._last = b""

    def __len__(self) -> int:
        return len(self._sweep) + len(self._arrived)

    def add(self, key: bytes, item: T) -> None:
        self._arrived.append((key, next(self._number), item))

    def take(self) -> T:
        """The next one. Raises IndexError when nothing waits."""
        if not self._sweep:
            if self._ordered:
                self._arrived.sort(key=itemgetter(0, 1))
                start = bisect_right(self._arrived, self._last, key=itemgetter(0))
                self._sweep.extend(self._arrived[start:])
                self._sweep.extend(self._arrived[:start])
            else:
                self._sweep.extend(self._arrived)
            self._arrived = []
        self._last, _, item = self._sweep.popleft()
        return item

    def drop(self, gone: Callable[[T], bool]) -> None:
        """Forget those of which `gone` is true."""
        self._sweep = deque(entry for entry in self._sweep if not gone(entry[2]))
        self._arrived = [entry for entry in self._arrived if not gone(entry[2])]


class PrefixRouter:
    """Sends a prompt to the replica that last got the longest beginning of it, unless that one has too much to do.

    `slack` is how many requests a replica may have more than the one with the fewest before it counts as overloaded.
    Remembers the last 16,384 beginnings. Not thread-safe.
    """

    def __init__(self, slack: int) -> None:
        self._slack = slack
        self._slots: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, messages: Messages, load: Sequence[int]) -> int:
        """The slot for a prompt; `load` is the number of requests under way in each slot."""
        fewest = min(load)
        slot = load.index(fewest)
        beginnings = _beginnings(messages)
        for beginning in reversed(beginnings):
            known = self._slots.get(beginning)
            if known is not None and known < len(load):
                if load[known] < fewest + self._slack:
                    slot = known
                break
        for beginning in beginnings:
            self._slots[beginning] = slot
            self._slots.move_to_end(beginning)
        while len(self._slots) > _REMEMBERED:
            self._slots.popitem(last=False)
        return slot


def _beginnings(messages: Messages) -> list[bytes]:
    """Hashes of the prompt's beginnings of each span that it is long enough for, shortest first."""
    text = "\x00".join(part for message in messages for part in message)[: _SPANS[-1]]
    digest, found, start = hashlib.blake2b(digest_size=8), [], 0
    for span in _SPANS:
        if len(text) < span:
            break
        digest.update(text[start:span].encode("utf-8", "surrogatepass"))
        found.append(digest.digest())
        start = span
    return found
