"""How instructions open: the verb that comes first and its object ("write story", 写 文章), and a cap on each pair.

Self-Instruct (Wang et al. 2023, figure 2) shows the variety of a set by root verb and direct object of its instructions, found
by a constituency parser. Here English goes by rules over a list of words that end a noun phrase, Chinese by jieba's word classes:
small, the same everywhere, and right often enough for a cap (measured in docs/curation.md).

English: what people say before the matter ("Can you please") is dropped, the first word is the verb (or the question word);
the object is the last word of the first run of words behind it that holds no preposition, pronoun, verb form or mark.
Chinese: the first verb behind 请 / 帮我 / 你能; the object is the last noun of the first clause behind it.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import rjieba
from pydantic import Field

from operators.config import Settings
from operators.synthesis.curate.set_operator import ReadKeys, Removed, SetOperator, draws, surplus
from operators.synthesis.curate.turns import Turns, instructions

_WINDOW = 200  # characters of an instruction's beginning that are looked at
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_POLITE = re.compile(
    r"^(?:(?:hi|hello|hey|please|kindly|now|so|ok|okay|then|and|also|just|well)\b[,!. ]*"
    r"|(?:can|could|would|will) you (?:please |kindly |help me (?:to )?|be able to )?"
    r"|(?:i(?:'d| would) like (?:you )?to|i(?:'d| would) like|i (?:want|need)(?: you)? to|i want|i need|"
    r"you (?:should|must|need to|are to|will)|let's|help me(?: to)?|"
    r"your task is to|try to|"
    r"in this task,? you (?:are given|will|need to|are asked to)|given [^,.]{1,60}[,.]|using [^,.]{1,60}, )\s*)+",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*|[^\sA-Za-z]")
_FILE = Path(__file__).with_name("openings.json")
_WORDS = {name: frozenset(words.split()) for name, words in json.loads(_FILE.read_text("utf-8")).items()}
_SKIPPED, _STOPS = _WORDS["skipped"], _WORDS["stops"]  # before a noun: articles, numbers; what ends a noun phrase
_NOUN_ING, _QUESTION, _LEADING = _WORDS["nouns_in_ing"], _WORDS["questions"], _WORDS["leading"]
_ZH_VERBS, _ZH_LEADING, _ZH_ENDS = _WORDS["zh_verbs"], _WORDS["zh_leading"], _WORDS["zh_ends"]
_ZH_POLITE = re.compile(
    "^(?:(?:请问|请你|请您|请|麻烦(?:你|您)?|你好|您好|帮忙|帮我|帮|你能否|你能不能|你能|你可以|"
    "您能|您可以|能否|能不能|可以|我想要|我想|我要|我需要|我希望你|希望你|给我|为我|让我们|现在|一下)[，,！!。 ]*)+"
)
_ZH_QUESTION = ("什么", "为什么", "如何", "怎么", "怎样", "哪", "谁", "多少", "几", "是否", "吗")
_ZH_COMPLEMENT = re.compile("(?:成|为|到|给)$")  # 翻译成 -> 翻译
_ZH_CLAUSE = re.compile('[，,。.；;：:？?！!\n（(《“"「、]')


class OpeningSettings(Settings):
    """How many rows may open alike."""

    max_share: float = Field(default=0.05, gt=0, le=1, description="largest share of the kept rows of one verb with its object")
    at_least: int = Field(default=20, ge=1, description="so many rows of a pair may stay in any case")


class OpeningDiversity(SetOperator):
    """Cap the share of one opening, verb and object, among the instructions (`common_opening`); which rows stay goes by a
    seeded hash of the id.

    The value is the share that the opening had, the detail the opening. Instructions without a known opening all stay.
    Statistics: the number of openings, their entropy in bits, and the 20 most frequent ones. 17 bytes a row.
    """

    name: ClassVar[str] = "opening_diversity"
    settings = OpeningSettings

    def keys(self, table: pa.Table) -> dict[str, pa.Array]:
        texts = pc.utf8_slice_codeunits(instructions(table, Turns(table)), 0, _WINDOW)
        distinct = pc.dictionary_encode(texts)  # a generated set repeats itself
        found = pa.array([None if text is None else opening(text) for text in distinct.dictionary.to_pylist()], pa.string())
        return {"opening": found.take(distinct.indices)}

    def resolve(self, read: ReadKeys, seed: int) -> Removed:
        numbers: dict[str, int] = {}
        codes: list[np.ndarray] = []
        ordinals: list[np.ndarray] = []
        drawn: list[np.ndarray] = []
        for keys in read():
            encoded: Any = pc.dictionary_encode(keys.table["opening"].combine_chunks())
            if isinstance(encoded, pa.ChunkedArray):
                encoded = encoded.combine_chunks()
            known = np.array([numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.to_pylist()], np.int64)
            places = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
            codes.append(np.where(places >= 0, known[np.maximum(places, 0)] if len(known) else -1, -1))
            ordinals.append(keys.ordinals)
            drawn.append(draws(keys.table["id"], seed))
        if not codes:
            return Removed.of(np.zeros(0, np.uint64), "common_opening", np.zeros(0))
        code, ordinal, draw = np.concatenate(codes), np.concatenate(ordinals), np.concatenate(drawn)
        counts = np.bincount(code[code >= 0], minlength=len(numbers))
        most = max(self.config.at_least, _cap(counts, int((code < 0).sum()), self.config.max_share))
        gone = [surplus(np.flatnonzero(code == number), draw, most) for number in np.flatnonzero(counts > most)]
        rows = np.concatenate([np.zeros(0, np.int64), *gone])
        names = list(numbers)
        shares = counts / max(1, len(code))
        positive = counts[counts > 0] / max(1, counts.sum())
        top = sorted(zip((-counts).tolist(), names, strict=True))[:20]
        stats = {
            "openings": len(names),
            "without": int((code < 0).sum()),
            "entropy_bits": round(float(-(positive * np.log2(positive)).sum()), 4),
            "cap": most,
            "most_frequent": {name: -count for count, name in top},
        }
        details = [names[number] for number in code[rows].tolist()]
        return Removed.of(ordinal[rows], "common_opening", np.round(shares[code[rows]], 6), details, stats)


def _cap(counts: np.ndarray, others: int, share: float) -> int:
    """The largest number that a pair may keep so that it has at most `share` of what is kept of all; 0 if there is none."""
    low, high = 0, int(counts.max(initial=0))
    while low < high:  # what is kept a pair allowed falls as the number grows, so the bound holds up to one place
        middle = (low + high + 1) // 2
        kept = int(np.minimum(counts, middle).sum()) + others
        low, high = (middle, high) if middle <= share * kept + 1e-9 else (low, middle - 1)
    return low


def opening(text: str) -> str | None:
    """`verb object` of an instruction, the verb alone where it has no object, None where no word opens it."""
    return _chinese(text) if _HAN.search(text[:40]) else _english(text)


def _english(text: str) -> str | None:
    words = _WORD.findall(_POLITE.sub("", text.strip().strip("\"'“”*#- ").replace("’", "'")).lower())
    while words and not words[0][0].isalpha():
        words = words[1:]
    if words and words[0] in _LEADING and "," in words[:20]:  # "For the given sentence, identify ..."
        behind = words[words.index(",") + 1 :]
        words = behind if behind and behind[0][0].isalpha() else words
    if not words:
        return None
    verb, rest = words[0].split("'")[0], words[1:]
    if verb in _QUESTION and rest:
        rest = [word for word in rest if word not in ("is", "are", "was", "were", "do", "does", "did", "'s", "the")]
    run: list[str] = []
    for word in rest:
        if not word[0].isalnum() and word != "-":
            if run or word in ".?!;:":
                break
            continue
        if not run and (word in _SKIPPED or word.isdigit()):
            continue
        if word in _STOPS or (run and len(word) > 4 and word.endswith("ing") and word not in _NOUN_ING):
            break
        run.append(word)
    return f"{verb} {_singular(run[-1])}" if run else verb


def _singular(word: str) -> str:
    word = word.removesuffix("'s").strip("'-")
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _chinese(text: str) -> str | None:
    text = _ZH_POLITE.sub("", text.strip().strip("“”\"'*#- "))
    tagged = [(word, tag) for word, tag in rjieba.tag(text[: _WINDOW // 2])]
    at = _chinese_verb(tagged)
    if at is None:
        return next((word for word, _ in tagged if _HAN.match(word)), None)
    if tagged[at][0] in _ZH_QUESTION:
        clause = itertools.takewhile(lambda item: not _ZH_CLAUSE.match(item[0]), tagged)
        asked = [word for word, tag in clause if (tag[:1] in ("n", "l", "j", "i") or tag == "vn") and _HAN.match(word)]
        return f"{tagged[at][0]} {asked[-1]}" if asked else tagged[at][0]
    segment: list[tuple[str, str]] = []
    for word, tag in tagged[at + 1 :]:
        ends = bool(_ZH_CLAUSE.match(word)) or word in _ZH_ENDS or (word in _ZH_VERBS and tag == "v" and len(segment) > 1)
        if ends and (segment or word not in _ZH_ENDS):
            if segment:
                break
            continue
        if _HAN.match(word):
            segment.append((word, tag))
    nouns = [word for word, tag in segment if tag[:1] in ("n", "l", "j", "i", "a") or tag == "vn"]
    last = next((word for word, tag in reversed(segment) if len(word) > 1 and tag[:1] not in "rpcdufymqv"), None)
    if segment and len(segment[-1][0]) > 1 and segment[-1][1][:1] not in "rpcdufym":
        last = segment[-1][0]  # a head that the dictionary takes for a verb (摘要) still ends its phrase
    noun = last or (nouns[-1] if nouns else None)
    verb = tagged[at][0] if tagged[at][0] in _ZH_VERBS else _ZH_COMPLEMENT.sub("", tagged[at][0]) or tagged[at][0]
    return f"{verb} {noun}" if noun else verb


def _chinese_verb(tagged: list[tuple[str, str]]) -> int | None:
    """The place of the opening verb or question word: behind a leading phrase (将 ..., 根据 ...，) the first usual one."""
    first = next((place for place, (word, _) in enumerate(tagged) if _HAN.match(word)), None)
    if first is None:
        return None
    leads = tagged[first][0] in _ZH_LEADING
    verbs: list[int] = []
    for place, (word, tag) in enumerate(tagged[first:], first):
        if word in _ZH_QUESTION and not verbs:
            return place
        if (word in _ZH_VERBS or _ZH_COMPLEMENT.sub("", word) in _ZH_VERBS) and word not in _ZH_LEADING:
            return place
        if tag.startswith("v") and word not in ("可", "能", "要", "有", "是", "会", "想") and word not in _ZH_LEADING:
            verbs.append(place)
        if word in "。！？?!\n" or (verbs and not leads):
            break
    return verbs[0] if verbs else None
