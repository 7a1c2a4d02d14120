"""Symptoms of a model made worse, measured on its replies. Pure functions of texts; English and Chinese.

Words of text with spaces are runs of letters; of Chinese each character is a unit, so that one n-gram rule serves both.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from operators.synthesis.curate.refusals import refuses
from operators.synthesis.curate.turns import Said
from train import verify
from train.settings_alignment import JsonCheck, SqlCheck, XmlCheck

_UNIT = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W\d_\u3400-\u9fff\uf900-\ufaff]+(?:['’][^\W\d_]+)*|\d+")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_BROKEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffd\ue000-\uf8ff]")
_CHECKS = {"json": JsonCheck(check="json"), "xml": XmlCheck(check="xml"), "sql": SqlCheck(check="sql")}
_SHORTEST = 8  # units from which repetition inside a reply is judged


def units(text: str) -> list[str]:
    """Words and numbers, lower case; each Chinese character by itself. Marks are left out."""
    return [found.lower() for found in _UNIT.findall(unicodedata.normalize("NFKC", text))]


def _spoken(text: str) -> list[str]:
    """The units of a text; its marks where it has nothing else, for a model may answer with a row of dots."""
    return units(text) or [char for char in text if not char.isspace()]


def _grams(parts: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(parts[place : place + n]) for place in range(len(parts) - n + 1)]


def repetition(replies: Sequence[str], n: int = 4) -> float:
    """The mean over replies of the share of n-grams that stood before in the same reply (seq-rep-n: Welleck et al. 2020,
    section 6). Replies shorter than 8 units count as 0: they have no room to repeat themselves."""
    shares = []
    for reply in replies:
        parts = _spoken(reply)
        grams = _grams(parts, n) if len(parts) >= _SHORTEST else []
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return float(np.mean(shares)) if shares else 0.0


def distinct(replies: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of all replies (distinct-n: Li et al. 2016); 1.0 where there is none."""
    grams = [gram for reply in replies for gram in _grams(_spoken(reply), n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def common_opening(replies: Sequence[str], size: int = 4) -> tuple[float, str]:
    """The largest share of replies that begin with the same `size` units, and that opening; (0.0, "") where none is shared."""
    found: Counter[tuple[str, ...]] = Counter()
    for reply in replies:
        parts = _spoken(reply[:400])[:size]
        if len(parts) == size:
            found[tuple(parts)] += 1
    if not found:
        return 0.0, ""
    opening, times = min(found.items(), key=lambda item: (-item[1], item[0]))
    words = ("" if all(_HAN.match(part) or not part.isalnum() for part in opening) else " ").join(opening)
    return (times / len(replies), words) if times > 1 else (0.0, "")


def copied(replies: Sequence[str], training: Iterable[str], n: int = 8, covered: float = 0.5) -> float:
    """The share of replies of which at least `covered` of the n-grams stand in training texts. Memory holds the replies'
    n-grams alone, however many the training texts are."""
    own = [set(_grams(units(reply), n)) for reply in replies]
    wanted = set().union(*own) if own else set()
    seen: set[tuple[str, ...]] = set()
    for text in training:
        seen.update(wanted.intersection(_grams(units(text), n)))
    judged = [bool(grams) and len(grams & seen) >= covered * len(grams) for grams in own]
    return sum(judged) / len(judged) if judged else 0.0


def refusing(replies: Sequence[str]) -> tuple[float, float]:
    """(share that refuses, share that says it does not know), by the patterns that curating uses."""
    said = Said(pa.array(list(replies), pa.large_string()), np.arange(len(replies)), len(replies))
    no, unknown = refuses(said)
    return (float(no.mean()), float(unknown.mean())) if len(replies) else (0.0, 0.0)


def well_formed(replies: Sequence[str], form: str) -> float:
    """The share of replies that are `json`, `xml` or `sql` as a whole or in one Markdown fence. SQL is parsed, never run."""
    if not replies:
        return 0.0
    batch = verify.Batch([[]] * len(replies), list(replies), [None] * len(replies), [True] * len(replies))
    return float(np.mean(verify.function_of(_CHECKS[form])(batch).values))


class Vocabulary:
    """Words and pairs of Chinese characters that a corpus holds; frozen once built, bounded by the texts it is given."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.known: set[str] = set()
        for text in texts:
            self.known.update(_checked(text))

    def unknown(self, replies: Sequence[str]) -> float:
        """The share of the replies' words (pairs of characters in Chinese) that the corpus lacks; 0.0 where there are none."""
        pieces = [piece for reply in replies for piece in _checked(reply)]
        return sum(piece not in self.known for piece in pieces) / len(pieces) if pieces else 0.0


def _checked(text: str) -> list[str]:
    """What is looked up: words of letters, pairs of neighbouring Chinese characters."""
    parts = units(text)
    found = [part for part in parts if not part.isdigit() and not _HAN.match(part)]
    found += [left + right for left, right in itertools.pairwise(parts) if _HAN.match(left) and _HAN.match(right)]
    return found


def broken(replies: Sequence[str]) -> float:
    """The share of replies with a replacement, private-use or control character."""
    return sum(bool(re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffd\ue000-\uf8ff]", reply)) for reply in replies) / max(
        1, len(replies)
    )


def plateau(losses: Sequence[float]) -> float:
    """How much of its fall a training loss still makes in its last third: 0 where it stands still. Means of thirds, so that
    the noise of single steps counts little."""
    values = np.asarray(losses, float)
    if len(values) < 9:
        raise ValueError(f"a curve of {len(values)} points is too short to judge; 9 are needed")
    third = len(values) // 3
    first, middle, last = values[:third].mean(), values[third : 2 * third].mean(), values[-third:].mean()
    fall = first - last
    return float((middle - last) / fall) if fall > 0 else 0.0
