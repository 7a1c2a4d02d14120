"""Garble: replacement and control characters, text decoded wrongly, endless repetition, replies in another script.

Mojibake is what UTF-8 looks like when it is read as Windows-1252 (â€™, Ã©) or as GBK (锟斤拷, 鈥�). Repetition is the share
of a reply's shingles (5 words, or 5 characters of Chinese) that occurred before in it. A reply in another script than
its question is garble unless the question asks for a language, a translation or code.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.dedup.signatures import repeated_share
from operators.synthesis.curate import patterns
from operators.synthesis.curate.conversation_filter import ConversationFilter, first_reason, numbers
from operators.synthesis.curate.turns import ASKING, REPLIES, Said, Turns
from operators.text.analysis import Analysis

_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x{80}-\x{9f}]"
_PRIVATE = r"\p{Co}"
_MOJIBAKE = (
    r"â€[™œ\x{9d}˜“”¦¢\x{80}-\x{9f}]|Ã[\x{80}-\x{bf}¡-¿©¨ª«®¯°±²³´µ¶·¸¹º»¼½¾]|Â[\x{a0}-\x{bf}]|ï»¿|ï¿½|锟斤拷|烫烫烫|屯屯屯|鈥[\x{fffd}檚渟滄]"
    r"|[æçåèéäï][\x{80}-\x{bf}œž™š›€‚ƒ„…†‡ˆ‰Š‹Œ‘’“”•–—]{2}"
)


class GarbleSettings(Settings):
    """Limits."""

    max_replacement: int = Field(default=0, ge=0, description="most U+FFFD and private-use characters in the replies")
    max_control: int = Field(default=0, ge=0, description="most control characters (not tab, line feed, return)")
    max_mojibake: int = Field(default=0, ge=0, description="most places that look like UTF-8 read wrongly")
    max_repetition: float = Field(default=0.6, ge=0, le=1, description="highest share of a reply's shingles that are repeats")
    min_size: int = Field(default=40, ge=1, description="characters from which repetition is judged")
    other_script: bool = Field(default=True, description="drop replies in another script than the question, unless it asks so")
    min_letters: int = Field(default=20, ge=1, description="letters (Han three times) from which a reply has a script")


class GarbledReply(ConversationFilter):
    """Drop conversations with garbled replies: `replacement`, `control`, `mojibake`, `repetition`, `other_script`."""

    name: ClassVar[str] = "garbled_reply"
    settings = GarbleSettings
    decide_options = frozenset({"max_replacement", "max_control", "max_mojibake", "max_repetition", "other_script"})

    def files(self) -> list[str]:
        return patterns.files("scripts")

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`replacement`, `control`, `mojibake`, `other_script` int64 (of the last: replies), `repetition` float64 (highest)."""
        turns = Turns(table)
        replies = turns.of(*REPLIES)
        repetition = np.zeros(table.num_rows)
        np.maximum.at(repetition, replies.row, _repetition(replies.text, self.config.min_size))
        return {
            "replacement": pa.array(replies.sum(_count(replies.text, rf"\x{{fffd}}|{_PRIVATE}"))),
            "control": pa.array(replies.sum(_count(replies.text, _CONTROL))),
            "mojibake": pa.array(replies.sum(_count(replies.text, _MOJIBAKE))),
            "repetition": pa.array(np.round(repetition, 4)),
            "other_script": pa.array(replies.sum(self._other_script(turns, replies))),
        }

    def _other_script(self, turns: Turns, replies: Said) -> np.ndarray:
        """bool[replies]: Han where the question before has none and Latin letters, or the other way round."""
        asked = turns.of(*ASKING)
        spared = asked.any(patterns.load("scripts").matches(asked.text))
        han, latin = _shares(asked.by_row())
        chinese, western = han >= 0.5, latin >= 0.9
        own_han, own_latin = _shares(replies.text)
        letters = 3 * _count(replies.text, r"\p{Han}") + _count(replies.text, r"\p{Latin}")
        prose = _count(replies.text, r"(?i)\b(?:the|is|are|of|and|to|in|it|you|this|that|for|with)\b") >= 3
        wrong = (chinese[replies.row] & (own_latin >= 0.9) & prose) | (western[replies.row] & (own_han >= 0.5))
        return wrong & (letters >= self.config.min_letters) & ~spared[replies.row]

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        config = self.config
        rules = []
        for name in ("replacement", "control", "mojibake", "repetition"):
            score = numbers(scores, name)
            rules.append((name, score > getattr(config, f"max_{name}"), score))
        script = numbers(scores, "other_script")
        rules.append(("other_script", (script > 0) & config.other_script, script))
        return first_reason(rules, table.num_rows)


def _count(text: pa.Array, expression: str) -> np.ndarray:
    return np.asarray(pc.fill_null(pc.count_substring_regex(text, expression), 0).to_numpy(zero_copy_only=False), np.int64)


def _shares(text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(share of Han letters, of Latin ones) float64[texts] of both; Han ones count three times. 0 without a letter."""
    han, latin = 3.0 * _count(text, r"\p{Han}"), _count(text, r"\p{Latin}").astype(np.float64)
    total = np.maximum(han + latin, 1)
    return np.round(han / total, 6), np.round(latin / total, 6)


def _repetition(text: pa.Array, min_size: int) -> np.ndarray:
    """float64[texts]: the share of shingles that occurred before."""
    long = pc.utf8_length(text).to_numpy(zero_copy_only=False) >= min_size
    return np.where(long, repeated_share(text), 0.0)
