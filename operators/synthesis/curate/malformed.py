"""Malformed conversations and replies that contradict their prompt, as far as one row tells.

Each rule names its reason; the first one that fails decides:

    roles              no question, two speakers of one kind in a row where there should be turns, or no reply at the end
    empty_reply        a reply without a letter, digit or symbol
    placeholder        `<noinput>`, `nan` and the like instead of a reply
    reply_is_prompt    the reply is the question or its input, unchanged
    repeats_question   the reply begins by the whole question
    prompt_marker      the reply goes on with a turn of its own ("### Instruction:", "User:", <|im_start|>, 用户：)
    code_fence         a code fence is opened and not closed
    json               JSON was asked for, or claimed by a fence or a call, and does not parse
    trailing_colon     the reply ends where its list should begin
    truncated          prose that ends in the middle of a sentence

That one question has different answers is seen over a whole set only (operator `contradictions`).
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.synthesis.curate.conversation_filter import ConversationFilter, first_reason, numbers
from operators.synthesis.curate.patterns import Patterns
from operators.synthesis.curate.turns import ASKING, REPLIES, Said, Turns, input_starts, sizes
from operators.text.analysis import Analysis

Rule = Literal[
    "roles", "empty_reply", "placeholder", "reply_is_prompt", "repeats_question", "prompt_marker", "code_fence", "json",
    "trailing_colon", "truncated",
]  # fmt: skip
RULES: tuple[Rule, ...] = (
    "roles", "empty_reply", "placeholder", "reply_is_prompt", "repeats_question", "prompt_marker", "code_fence", "json",
    "trailing_colon", "truncated",
)  # fmt: skip

_PLACEHOLDER = (
    r"(?i)^\W*(?:no ?input|no ?output|nan|n/?a|undefined|\[?(?:insert|your) (?:answer|text|response) here\]?|无输入|无输出)\W*$"
)
_MARKER = Patterns(
    [
        r"<\|(?:im_start|im_end|endoftext|user|assistant|system|eot_id)\|>|\[/?INST\]|<</?SYS>>",
        r"(?:^|\n)\s*#{2,} ?(?:instruction|input|response|human|assistant|user|问题|指令|回答|输入)s? ?[:：]",
    ]
)
_PLAYS_BOTH = Patterns([r"\n\s*(?:human|user|用户|人类) ?[:：][^\n]+\n+\s*(?:assistant|ai|bot|gpt|助手|机器人) ?[:：]"])
_ASKS_DIALOGUE = Patterns(
    [r"\b(?:dialog|dialogue|conversation|script|chat|chatbot|interview|role-?play)\b|对话|脚本|聊天|剧本|访谈|扮演|会话"]
)
_ASKS_JSON = Patterns([r"\bjson\b"])
_FENCED_JSON = re.compile(r"```json[^\S\n]*\n(.*?)\n?[^\S\n]*```", re.IGNORECASE | re.DOTALL)
_ENDED = r"[.!?。！？…;；~～\"'”’»」』》)\]）】}>*_`|\\/$%°€£¥+=\-—–·•\p{S}]\s*$"
# a last line that may well end without a mark: list items, headings, table rows, formulas, signatures, links, code
_LOOSE_LINE = (
    r"^\s*(?:[-*+•·▪◦#>|$=]|\(?[0-9a-zA-Z一二三四五六七八九十]{1,3}[.)、:：）]|\[\d+\]|第[一二三四五六七八九十\d]+|https?://"
    r"|\w+ ?[:：=]|[A-Z][\w ]{0,20}: )"
)
_SENTENCE_END = r"[。！？]|[.!?](?:[\"'”’)\]）】]|\s|$)"


class MalformedSettings(Settings):
    """Which rules apply."""

    rules: list[Rule] = Field(default=list(RULES), min_length=1, description="the rules that reject, see the operator's reasons")
    long_question: int = Field(
        default=24, ge=1, description="shorter questions may be repeated; Chinese characters count three times"
    )
    min_last_line: int = Field(
        default=60, ge=1, description="a shorter last line is never called truncated; Chinese characters count three times"
    )


class MalformedReply(ConversationFilter):
    """Drop conversations of a broken shape and replies that are empty, copied, cut off, or no valid JSON or code block.

    Reasons: roles, empty_reply, placeholder, reply_is_prompt, repeats_question, prompt_marker, code_fence, json,
    trailing_colon, truncated. The value is the number of messages that fail (of `truncated` the size of the last line).
    """

    name: ClassVar[str] = "malformed_reply"
    settings = MalformedSettings
    decide_options = frozenset({"rules", "min_last_line"})

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """One int64 score a rule: how many messages fail it; `truncated` is the size of an unfinished last line, else 0."""
        turns = Turns(table)
        replies, asked, last = turns.of(*REPLIES), turns.of(*ASKING), turns.of(*REPLIES).last()
        ended = last.where(turns.last_role[last.row] == "assistant")
        trimmed = pc.utf8_trim_whitespace(replies.text)
        copied, repeated = _copies(table, turns, replies, self.config.long_question)
        dialogue = asked.any(_ASKS_DIALOGUE.matches(asked.text))
        marked = _MARKER.matches(replies.text) | (_PLAYS_BOTH.matches(replies.text) & ~dialogue[replies.row])
        scores = {
            "roles": _roles(turns),
            "empty_reply": replies.sum(pc.equal(pc.utf8_length(pc.replace_substring_regex(trimmed, r"[\p{P}\p{Z}\p{C}]+", "")), 0)),
            "placeholder": replies.sum(pc.match_substring_regex(trimmed, _PLACEHOLDER)),
            "reply_is_prompt": replies.sum(copied),
            "repeats_question": replies.sum(repeated),
            "prompt_marker": replies.sum(marked),
            "code_fence": replies.sum(_open_fences(replies)),
            "json": _bad_json(turns, asked, replies),
            "trailing_colon": ended.sum(pc.match_substring_regex(ended.text, r"[:：]\s*$")),
            "truncated": ended.sum(_unfinished(ended)),
        }
        return {name: pa.array(np.asarray(values, np.int64)) for name, values in scores.items()}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        rules = []
        for rule in (rule for rule in RULES if rule in self.config.rules):
            score = numbers(scores, rule)
            rules.append((rule, score >= self.config.min_last_line if rule == "truncated" else score > 0, score))
        return first_reason(rules, table.num_rows)


def _roles(turns: Turns) -> np.ndarray:
    """int64[rows]: 1 where turns do not alternate as they should."""
    wrong = ~np.isin(turns.last_role, ["assistant", "function_call"])
    wrong |= ~turns.of(*ASKING).any(np.ones(len(turns.of(*ASKING)), bool))
    same = np.zeros(len(turns.row), bool)
    for role in ("user", "assistant", "system"):
        flags = turns.is_role(role)
        same[1:] |= flags[1:] & flags[:-1] & (turns.row[1:] == turns.row[:-1])
    return (wrong | turns.all.any(same)).astype(np.int64)


def _copies(table: pa.Table, turns: Turns, replies: Said, long_question: int) -> tuple[np.ndarray, np.ndarray]:
    """(the reply is its question or the input, the reply begins by the question) bool[replies]; the question is the message
    before the reply."""
    places = np.flatnonzero(turns.is_role(*REPLIES))
    before = np.maximum(places - 1, 0)
    pairs = (places > 0) & (turns.row[before] == turns.row[places]) & turns.is_role(*ASKING)[before]
    question = pc.utf8_trim_whitespace(turns.text.take(pa.array(before)))
    reply = pc.utf8_trim_whitespace(replies.text)
    same = pc.equal(question, reply).to_numpy(zero_copy_only=False) & pairs
    starts = input_starts(table)[replies.row]
    for at in np.flatnonzero(pairs & (starts >= 0) & ~same):  # sparse: rows with an input; the copy is tried in C
        same[at] = turns.text[int(before[at])].as_py()[starts[at] :].strip() == reply[int(at)].as_py()
    size = [pc.binary_length(text).to_numpy(zero_copy_only=False) for text in (question, reply)]
    longer = np.flatnonzero(pairs & ~same & (sizes(question) >= long_question) & (size[1] > size[0]))
    begins = np.zeros(len(replies), bool)
    for at in longer:
        begins[at] = reply[int(at)].as_py().startswith(question[int(at)].as_py())
    return same & pairs, begins


def _open_fences(replies: Said) -> np.ndarray:
    """bool[replies]: an odd number of fences."""
    fences = pc.count_substring(replies.text, "```").to_numpy(zero_copy_only=False)
    return np.asarray(fences % 2 == 1)


def _bad_json(turns: Turns, asked: Said, replies: Said) -> np.ndarray:
    """int64[rows]: replies that claim to be JSON, and calls, that do not parse."""
    wanted = asked.any(_ASKS_JSON.matches(asked.text))[replies.row]
    shaped = pc.match_substring_regex(replies.text, r"^\s*[\[{][\s\S]*[\]}]\s*$").to_numpy(zero_copy_only=False)
    fenced = pc.match_substring_regex(replies.text, r"(?i)```json\s").to_numpy(zero_copy_only=False)
    bad = np.zeros(len(replies), bool)
    for at in np.flatnonzero((wanted & shaped) | fenced):  # sparse, and the parser is compiled
        text = replies.text[int(at)].as_py()
        pieces = _FENCED_JSON.findall(text) if fenced[at] else [text]
        bad[at] = not all(map(_parses, pieces))
    calls = turns.of("function_call")
    broken = np.array([not _parses(text) for text in calls.text.to_pylist()], bool)
    return replies.sum(bad) + (calls.sum(broken) if len(calls) else 0)


def _parses(text: str) -> bool:
    """Whether a text is JSON, or JSON lines."""
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or not all(line.lstrip()[:1] in ("{", "[") for line in lines):
            return False
        try:
            for line in lines:
                orjson.loads(line)
        except orjson.JSONDecodeError:
            return False
    return True


def _unfinished(replies: Said) -> np.ndarray:
    """int64[replies]: size of the last line of prose that ends without a mark, 0 where it ends well or is no prose."""
    text = pc.utf8_rtrim_whitespace(replies.text)
    last = pc.replace_substring_regex(text, r"(?s)^.*\n", "")
    loose = pc.match_substring_regex(last, _LOOSE_LINE).to_numpy(zero_copy_only=False)
    ended = pc.match_substring_regex(last, rf"{_ENDED}|(?:[#@]|://)\S+$").to_numpy(zero_copy_only=False)
    sentences = pc.count_substring_regex(text, _SENTENCE_END).to_numpy(zero_copy_only=False)
    fenced = pc.match_substring(text, "```").to_numpy(zero_copy_only=False)
    return np.where(loose | ended | fenced | (sentences < 2), 0, sizes(last))
