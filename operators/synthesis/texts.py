"""Strings by number, for pools of millions: their bytes in one buffer instead of an object each."""

from __future__ import annotations

from array import array


class Texts:
    """A growing list of strings. Memory: their UTF-8 bytes and 8 bytes each (a list of `str` costs 60 more each)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self._ends):
            raise IndexError(f"no text {number} among {len(self._ends)}")
        start = self._ends[number - 1] if number else 0
        return self._data[start : self._ends[number]].decode("utf-8", "surrogatepass")

    def append(self, text: str) -> int:
        """Add a text; its number."""
        self._data += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._data))
        return len(self._ends) - 1
