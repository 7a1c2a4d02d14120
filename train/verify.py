"""Rewards that can be verified: what a reply is worth, by rules alone.

Each check is a function of a batch of replies, deterministic (but for the time limit of a pattern), and never fails on what a
model wrote: a reply that a check cannot digest scores 0 and is counted. A score that does not apply, such as an exact answer where
there is no reference, is NaN and counts nothing. Numbers, letters and words are compared as values: １２, 12 and 十二 are one
number, Ｂ and b one letter.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
from lxml import etree
from referencing import Registry

from operators.config import SettingsError
from operators.synthesis.curate import numerals
from operators.synthesis.heuristics import language_of, length_of, repeated_share, script_share
from train import settings_alignment as told

MOST_CHARACTERS = 200_000
"""Of a reply that is looked at."""


@dataclass(frozen=True)
class Batch:
    """Replies with what belongs to them, lists of one length: prompt messages, the reply's text, the reference if there is
    one, and whether the reply ended by itself."""

    prompts: Sequence[Sequence[dict[str, str]]]
    replies: Sequence[str]
    references: Sequence[str | None]
    finished: Sequence[bool]

    def __len__(self) -> int:
        return len(self.replies)

    def row(self, index: int) -> Batch:
        """One reply as a batch."""
        at = slice(index, index + 1)
        return Batch(self.prompts[at], self.replies[at], self.references[at], self.finished[at])


@dataclass(frozen=True)
class Scores:
    """float64[replies], NaN where a check does not apply; and what went wrong, by index of the reply (its score is 0)."""

    values: np.ndarray
    failures: dict[int, str]


Function = Callable[[Batch], Scores]


def function_of(check: Any) -> Function:
    """The function of a check's settings. Raises SettingsError for an import path that leads nowhere.

    Reward models are functions of `train.grpo`: they need a device.
    """
    if isinstance(check, told.CustomCheck):
        return _custom(check)
    rows = _RULES[type(check)](check)
    return lambda batch: _guarded(batch, lambda part: np.array([rows(part, index) for index in range(len(part))], np.float64))


def _guarded(batch: Batch, score: Callable[[Batch], np.ndarray]) -> Scores:
    """The scores of a batch; if it fails, each reply by itself, and those that fail alone score 0."""
    try:
        return Scores(score(batch), {})
    except Exception:  # noqa: BLE001  which reply it was is found out below
        pass
    values, failures = np.zeros(len(batch)), dict[int, str]()
    for index in range(len(batch)):
        try:
            values[index] = score(batch.row(index))[0]
        except Exception as error:  # noqa: BLE001  counted and told; no reply may end a training run
            failures[index] = f"{type(error).__name__}: {error}"[:300]
    return Scores(values, failures)


def _custom(check: told.CustomCheck) -> Function:
    module, _, name = check.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"the reward function {check.function} cannot be imported: {error}") from error

    def score(batch: Batch) -> np.ndarray:
        found = list(function(batch, **check.arguments))
        if len(found) != len(batch):
            raise ValueError(f"{check.function} returned {len(found)} numbers for {len(batch)} replies")
        values = np.array([math.nan if value is None else float(value) for value in found], np.float64)
        if np.isinf(values).any():
            raise ValueError(f"{check.function} returned an infinite number")
        return values

    return lambda batch: _guarded(batch, score)


# Answers

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_ANSWER_LINE = re.compile(
    r"(?:####|(?:final\s+)?answer\s*(?:is\s*:?|[:=])|(?:最终)?答案\s*(?:是\s*:?|为\s*:?|[:=])|(?:故|应|因此|所以)?选择?\s*:?(?=\s*[(（]?[A-Z]\b))",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL | re.IGNORECASE)


def final_answer(text: str) -> str:
    r"""What a text gives as its answer: the last \boxed{...}, else the last <answer>, else what follows the last `####`,
    `Answer:`, `the answer is` or `答案：` on its line, else all of it; thoughts (up to </think>) left out."""
    text = _THOUGHT.sub("", unicodedata.normalize("NFKC", text[:MOST_CHARACTERS]))
    boxed = _boxed(text)
    if boxed is not None:
        return boxed.strip()
    tagged = _ANSWER_TAG.findall(text)
    if tagged:
        inner = tagged[-1]
        return inner.strip() if not _ANSWER_LINE.search(inner) else final_answer(inner)
    lines = list(_ANSWER_LINE.finditer(text))
    if lines:
        rest = text[lines[-1].end() :].strip()
        return rest.splitlines()[0].strip() if rest else ""
    return text.strip()


def _boxed(text: str) -> str | None:
    r"""The contents of the last \boxed{...}, braces balanced; None without a whole one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    first = start + len("\\boxed{")
    depth = 1
    for place in range(first, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return text[first:place]
    return None


_LATEX = re.compile(r"\\(?:left|right|displaystyle|,|;|!|:|quad)|\\(?:text|mathrm|mathbf)\s*(?=\{)")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_BETWEEN_HAN = re.compile(r"(?<=[\u2e80-\u9fff])\s+|\s+(?=[\u2e80-\u9fff])")
_EDGES = " \t\r\n.,;:!?。，、；：！？\"'“”‘’「」『』*`$"


def normalised(text: str) -> str:
    """A short answer as it is compared: full-width forms narrowed, case folded, marks at the ends, LaTeX dress and white
    space (between Chinese characters all of it) taken off."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _FRACTION.sub(r"\1/\2", text)
    text = _LATEX.sub("", text).replace("\\%", "%").replace("\\$", "$").replace("{", "").replace("}", "")
    text = _BETWEEN_HAN.sub("", " ".join(text.split())).strip(_EDGES)
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip(_EDGES)
    return text


_SIGN = r"(?P<sign>[-+−–负]|minus\s+|negative\s+)?\s*"
_HAN_DECIMAL = re.compile(r"^([零〇一二两三四五六七八九十百千万亿]+)点([零〇一二三四五六七八九]+)$")
_SCIENTIFIC = re.compile(r"^(\d+(?:\.\d+)?|\.\d+)(?:e|\s*[x×*]\s*10\s*\^\s*)([-+−]?\d{1,3})$")
_MEASURE = re.compile(
    r"^(?:[$€£¥]|us\$|rmb)\s*|\s*(?:元|块钱|块|美元|人民币|个|只|人|米|千米|公里|厘米|千克|公斤|克|小时|分钟|秒|天|岁|次|本|页|"
    r"dollars?|yuan|cents?|km|cm|m|kg|g|hours?|minutes?|seconds?|days?|years?|apples?)$"
)
_ANY_NUMBER = re.compile(
    r"[-−–负]?\s*(?:\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3})?(?:\s*/\s*\d+(?:\.\d+)?)?\s*[%‰万亿]*"
    r"|(?:百分之|负)?[零〇一二两三四五六七八九十百千万亿]+(?:点[零〇一二三四五六七八九]+)?(?:分之[零〇一二两三四五六七八九十百千万亿]+)?"
)


def quantity(text: str) -> float | None:
    """The number that a whole short answer is: 1,234.5, １２, -3/4, 12%, 3.5万, 1.2e-3, 三百二十, 负三点一四, 三分之一,
    twenty-five, with a currency or a unit around it; None for anything else."""
    text = normalised(text)
    for _ in range(2):  # a currency before, a unit behind
        text = _MEASURE.sub("", text).strip()
    match = re.match(_SIGN, text)
    assert match is not None  # everything in it is optional
    sign = -1.0 if match["sign"] and match["sign"].strip() in ("-", "−", "–", "负", "minus", "negative") else 1.0
    value = _magnitude(text[match.end() :].strip())
    return None if value is None else sign * value


def _magnitude(text: str) -> float | None:
    if not text or len(text) > 100:
        return None
    for mark, scale in (("%", 0.01), ("‰", 0.001)):
        if text.endswith(mark):
            return _scaled(_magnitude(text[:-1].strip()), scale)
    if text.startswith("百分之"):
        return _scaled(_magnitude(text[3:]), 0.01)
    if "分之" in text:
        below, _, above = text.partition("分之")
        return _ratio(_magnitude(above), _magnitude(below))
    if "/" in text:
        above, _, below = text.partition("/")
        return _ratio(_magnitude(above.strip()), _magnitude(below.strip()))
    scientific = _SCIENTIFIC.match(text)
    if scientific:
        return float(f"{scientific[1]}e{scientific[2].replace('−', '-')}")
    decimal = _HAN_DECIMAL.match(text)
    if decimal:
        whole = _magnitude(decimal[1])
        digits = "".join(str("零一二三四五六七八九".index(char.replace("〇", "零"))) for char in decimal[2])
        return None if whole is None else whole + float(f"0.{digits}")
    found = numerals.values(text)
    return found[0][0] if len(found) == 1 and found[0][1] == text else None


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else round(value * scale, 12)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def last_number(text: str) -> float | None:
    """The last number that is written anywhere in a text."""
    for match in reversed(list(_ANY_NUMBER.finditer(unicodedata.normalize("NFKC", text[-10_000:]).casefold()))):
        value = quantity(match.group())
        if value is not None:
            return value
    return None


def same_answer(reply: str, reference: str) -> bool:
    """Whether two texts settle on the same answer: alike once normalised, or the same number."""
    given, wanted = final_answer(reply), final_answer(reference)
    if normalised(given) == normalised(wanted):
        return bool(normalised(wanted)) or given == wanted
    number, value = quantity(given), quantity(wanted)
    return number is not None and value is not None and math.isclose(number, value, rel_tol=1e-9, abs_tol=1e-12)


Row = Callable[[Batch, int], float]


def _exact(check: told.ExactAnswer) -> Row:
    def score(batch: Batch, index: int) -> float:
        reference = batch.references[index]
        return math.nan if reference is None else float(same_answer(batch.replies[index], reference))

    return score


def _numeric(check: told.NumericAnswer) -> Row:
    def number(text: str) -> float | None:
        answer = final_answer(text)
        whole = quantity(answer)
        return last_number(answer) if whole is None else whole

    def score(batch: Batch, index: int) -> float:
        reference = batch.references[index]
        wanted = None if reference is None else number(reference)
        if wanted is None:
            return math.nan
        given = number(batch.replies[index])
        return float(
            given is not None and math.isclose(given, wanted, rel_tol=0, abs_tol=max(check.absolute, check.relative * abs(wanted)))
        )

    return score


def chosen_letters(text: str, letters: str) -> frozenset[str] | None:
    """The choice that a text settles on: B, (B), B., 选B, 答案：ＢＤ, \\boxed{A, C}; None where there is none."""
    answer = unicodedata.normalize("NFKC", final_answer(text)).strip(_EDGES)
    one = rf"[{letters}]"
    whole = re.fullmatch(rf"[(\[]?({one}(?:\s*(?:[,、和&]|and)?\s*{one})*)[)\]]?", answer, re.IGNORECASE)
    if whole:
        bare = re.sub(r"\band\b", "", whole[1], flags=re.IGNORECASE)
        return frozenset(char for char in bare.upper() if char in letters)
    opening = re.match(rf"[(\[]?({one})(?:[)\].:、,，]|\s*$|\s+(?=[-–—]))", answer)
    if opening:
        return frozenset(opening[1])
    named = re.findall(rf"[(\[]({one})[)\]]|(?:option|choice|选项?)\s*({one})(?![A-Za-z])", answer)
    if named:
        return frozenset(next(filter(None, named[-1])))
    return None


def _choice(check: told.ChoiceAnswer) -> Row:
    def score(batch: Batch, index: int) -> float:
        reference = batch.references[index]
        wanted = None if reference is None else chosen_letters(reference, check.letters)
        return math.nan if wanted is None else float(chosen_letters(batch.replies[index], check.letters) == wanted)

    return score


# Form

_FENCE = re.compile(r"^\s*```[\w+-]*[ \t]*\n(.*?)\n?```\s*$", re.DOTALL)


def _part(text: str, part: str) -> str | None:
    """The reply or its <answer>, without a Markdown fence around it; None where it has no one answer."""
    if part == "answer":
        found = _ANSWER_TAG.findall(text)
        if len(found) != 1:
            return None
        text = found[0]
    fenced = _FENCE.match(text)
    return (fenced[1] if fenced else text).strip()


def _pattern(check: told.PatternCheck) -> Row:
    compiled = regex.compile(check.pattern)
    find = compiled.fullmatch if check.whole else compiled.search

    def score(batch: Batch, index: int) -> float:
        return float(find(batch.replies[index][:MOST_CHARACTERS], timeout=check.timeout_s) is not None)

    return score


def _tags(check: told.TagsCheck) -> Row:
    inside = r"\s*".join(rf"<{tag}>(?P<t{number}>(?:(?!</?{tag}>).)+)</{tag}>" for number, tag in enumerate(check.tags))
    whole = re.compile(rf"\s*{inside}\s*", re.DOTALL)
    marks = [f"<{tag}>" for tag in check.tags] + [f"</{tag}>" for tag in check.tags]

    def score(batch: Batch, index: int) -> float:
        text = batch.replies[index][:MOST_CHARACTERS]
        once = [text.count(mark) == 1 for mark in marks]
        if all(once):
            match = whole.fullmatch(text)
            if match and all(piece.strip() for piece in match.groups()):
                return 1.0
        return 0.5 * sum(once) / len(marks) if check.partial else 0.0

    return score


def _json(check: told.JsonCheck) -> Row:
    validator = None
    if check.json_schema is not None:
        import jsonschema

        # An empty registry: a schema that refers to another address is not fetched.
        validator = jsonschema.Draft202012Validator(check.json_schema, registry=Registry())

    def score(batch: Batch, index: int) -> float:
        text = _part(batch.replies[index][:MOST_CHARACTERS], check.part)
        if text is None:
            return 0.0
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator is None or validator.is_valid(value))

    return score


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _xml(check: told.XmlCheck) -> Row:
    def score(batch: Batch, index: int) -> float:
        text = _part(batch.replies[index][:MOST_CHARACTERS], check.part)
        if not text or "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities can be made to grow without bound
            return 0.0
        parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
        try:
            # A declared encoding would not be that of the bytes; it says nothing about the form.
            root = etree.fromstring(re.sub(r"^<\?xml[^>]*\?>", "", text).encode("utf-8", "strict"), parser)
        except (etree.XMLSyntaxError, UnicodeEncodeError, ValueError):
            return 0.0
        return float(check.root is None or etree.QName(root).localname == check.root)

    return score


_PARSED = re.compile(
    r"^(no such (table|column|function|module|collation|index|view|database)|ambiguous column|.* has no column|.* already exists)"
)
_MOST_STATEMENTS = 100


def _sql(check: told.SqlCheck) -> Row:
    # What a reply could do is nothing: statements are explained, never run, and these are refused at once.
    refused = {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA}

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:")
        if check.tables is not None:
            connection.executescript(check.tables)
        connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, MOST_CHARACTERS)
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action in refused else sqlite3.SQLITE_OK)
        return connection

    def score(batch: Batch, index: int) -> float:
        text = _part(batch.replies[index][:MOST_CHARACTERS], check.part)
        statements = _statements(text or "")
        if not 0 < len(statements) <= _MOST_STATEMENTS:
            return 0.0
        connection = connect()
        try:
            for statement in statements:
                try:
                    connection.execute(f"EXPLAIN {statement}")
                except (sqlite3.Error, sqlite3.Warning, ValueError, UnicodeEncodeError) as error:
                    if check.tables is not None or not _PARSED.match(str(error)):
                        return 0.0
        finally:
            connection.close()
        return 1.0

    return score


def _statements(text: str) -> list[str]:
    """The statements of a script: cut after each semicolon at which SQLite holds a statement for complete."""
    found, start = [], 0
    for match in re.finditer(";", text):
        if sqlite3.complete_statement(text[start : match.end()]):
            found.append(text[start : match.end()].strip())
            start = match.end()
            if len(found) > _MOST_STATEMENTS:
                return found
    return [piece for piece in [*found, text[start:].strip()] if piece.strip("; \n\t")]


def _length(check: told.LengthCheck) -> Row:
    def score(batch: Batch, index: int) -> float:
        text = batch.replies[index][:MOST_CHARACTERS]
        length = length_of(text, language_of(text))
        beyond = max(check.least - length, length - check.most if check.most is not None else 0, 0)
        return 1.0 if not beyond else max(0.0, 1.0 - beyond / check.slack) if check.slack else 0.0

    return score


_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


def _language(check: told.LanguageCheck) -> Row:
    def score(batch: Batch, index: int) -> float:
        wanted = check.language
        if wanted == "prompt":
            asked = [message["content"] or "" for message in batch.prompts[index] if message["role"] == "user"]
            wanted = "zh" if language_of(asked[-1] if asked else "") == "zh" else "en"
        text = _CODE.sub("", batch.replies[index][:MOST_CHARACTERS])
        if not any(char.isalpha() for char in text):
            return math.nan if text.strip() else 0.0  # a number is in no language
        return float(script_share(text, wanted) >= check.least_share)

    return score


def _repetition(check: told.RepetitionCheck) -> Row:
    return lambda batch, index: -repeated_share(batch.replies[index][:MOST_CHARACTERS], check.ngram)


def _finished(check: told.FinishedCheck) -> Row:
    return lambda batch, index: float(batch.finished[index])


_RULES: dict[type, Callable[[Any], Row]] = {
    told.ExactAnswer: _exact,
    told.NumericAnswer: _numeric,
    told.ChoiceAnswer: _choice,
    told.PatternCheck: _pattern,
    told.TagsCheck: _tags,
    told.JsonCheck: _json,
    told.XmlCheck: _xml,
    told.SqlCheck: _sql,
    told.LengthCheck: _length,
    told.LanguageCheck: _language,
    told.RepetitionCheck: _repetition,
    told.FinishedCheck: _finished,
}
