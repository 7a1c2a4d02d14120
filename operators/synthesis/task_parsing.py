"""What a model said at each step of Self-Instruct, read: lists of tasks, labels, inputs, forms, in English and Chinese."""

from __future__ import annotations

import re
from functools import lru_cache

from operators.synthesis import heuristics
from operators.synthesis.prompts import Prompt
from operators.synthesis.requests import Reject, Reply

_ITEM = re.compile(r"^[ \t]*(?:(?:\d{1,3}[.)、．:：](?!\d)|Task \d+[.:]|任务 ?\d+[.:：])[ \t]*)+", re.MULTILINE)
_YES, _NO = re.compile(r"\s*(?:yes|是的?(?!否)|对)", re.IGNORECASE), re.compile(r"\s*(?:no|否|不是|不)", re.IGNORECASE)
_LABEL = re.compile(r"^\s*(?P<label>.*?)\s*\n\s*(?:Input|输入)\s*[:：]\s*(?P<input>.*)\Z", re.DOTALL | re.IGNORECASE)
_NEXT_LABEL = re.compile(r"^\s*(?:\d+[.)、]\s*)?(?:Class )?(?:Label|标签)\s*[:：]", re.MULTILINE | re.IGNORECASE)
_EXAMPLE = re.compile(r"^\s*(?:Example|例子) ?\d+\s*[:：.]?\s*$", re.MULTILINE | re.IGNORECASE)
_FIELDS = re.compile(
    r"^\s*(?:(?:Input|输入)\s*[:：])?(?P<input>.*?)\n\s*(?:Output|输出)\s*[:：]\s*(?P<output>.*)\Z", re.DOTALL | re.IGNORECASE
)
_AFTER_INPUT = re.compile(r"\n\s*(?:Output|Task|Answer|输出|任务|答案|回答)\s*[:：]", re.IGNORECASE)
_ALPACA = re.compile(
    r"^\s*(?:\d+[.、]\s*)?(?:Instruction|指令)\s*[:：]\s*(?P<instruction>.*?)\n\s*(?:\d+[.、]\s*)?(?:Input|输入)\s*[:：]\s*(?P<input>.*?)"
    r"\n\s*(?:\d+[.、]\s*)?(?:Output|输出)\s*[:：]\s*(?P<output>.*)\Z",
    re.DOTALL | re.IGNORECASE,
)  # fmt: skip
_FIELD_NAME = re.compile(
    r"^\s*(?:Input|Output|Label|New prompt|Example \d+|输入|输出|标签|新的提示|例子 ?\d+)\s*[:：]?\s*", re.IGNORECASE
)
_BLOCK = re.compile(r"^[ \t]*#{2,}[ \t]*$|###", re.MULTILINE)


@lru_cache(maxsize=256)
def shown_examples(prompt: Prompt) -> tuple[str, ...]:
    """The inputs, outputs and rewrites that a template shows as examples, without their labels."""
    lines = [line for role, text in prompt.sections if role == "assistant" and "$" not in text for line in text.split("\n")]
    found = [_FIELD_NAME.sub("", line).strip() for line in lines]
    return tuple(line for line in found if heuristics.length_of(line, heuristics.language_of(line)) > 3)


def parse_instructions(reply: Reply, drop_reply: bool = False) -> list[str | Reject] | Reject:
    """The tasks of a numbered list that the model went on with.

    In a reply that was cut at its token limit the last task is a Reject; with `drop_reply` the whole reply is, as in
    the paper's code. `malformed`: no task at all.
    """
    if reply.truncated and drop_reply:
        return Reject("truncated", detail=reply.text)
    tasks: list[str | Reject] = [" ".join(piece.split()) for piece in _ITEM.split(reply.text)]
    tasks = [task for task in tasks if task]
    if not tasks:
        return Reject("malformed", detail=reply.text)
    if reply.truncated:
        tasks[-1] = Reject("truncated", detail=str(tasks[-1]))
    return tasks


def parse_alpaca(reply: Reply, first: str, drop_reply: bool = False) -> list[tuple[str, str, str] | Reject] | Reject:
    """(instruction, input, output) of each `###`-separated block; `first` is the beginning that the prompt supplied."""
    if reply.truncated and drop_reply:
        return Reject("truncated", detail=reply.text)
    found: list[tuple[str, str, str] | Reject] = []
    blocks = [block.strip() for block in _BLOCK.split(first + reply.text) if block.strip()]
    if not reply.text.strip() or not blocks:
        return Reject("malformed", detail=reply.text)
    for number, block in enumerate(blocks):
        match = _ALPACA.match(block)
        if reply.truncated and number == len(blocks) - 1:
            found.append(Reject("truncated", detail=block))
        elif match is None:
            found.append(Reject("malformed", detail=block))
        else:
            given = match["input"].strip()
            found.append((match["instruction"].strip(), "" if heuristics.no_input(given) else given, match["output"].strip()))
    return found


def parse_classification(reply: Reply) -> bool | None:
    """True or False, None when the reply says neither (taken as not a classification task, as in the paper's code)."""
    if _YES.match(reply.text):
        return True
    return False if _NO.match(reply.text) else None


def parse_input(reply: Reply) -> str | Reject:
    """The input that the model wrote for a task, "" when the task needs none."""
    if reply.truncated:
        return Reject("truncated")
    text = _AFTER_INPUT.split(reply.text)[0].strip()
    return "" if heuristics.no_input(text) else text


def parse_labelled(reply: Reply, most: int = 1, drop_reply: bool = False) -> list[tuple[str, str]] | Reject:
    """Up to `most` (input, label) of output-first examples; the last of a reply that was cut is left out."""
    blocks = [block for block in _NEXT_LABEL.split(reply.text) if block.strip()]
    if reply.truncated:
        blocks = [] if drop_reply else blocks[:-1]
    matches = [match for block in blocks[:most] if (match := _LABEL.match(block)) is not None]
    if not matches:
        return Reject("truncated" if reply.truncated else "malformed")
    return [(match["input"].strip(), match["label"].strip()) for match in matches]


def parse_forms(reply: Reply, most: int, drop_reply: bool = False) -> list[tuple[str, str]] | Reject:
    """Up to `most` (input, output) pairs; the last of a reply that was cut is left out, as in the paper's code."""
    blocks = [block for block in _EXAMPLE.split(reply.text) if block.strip()]
    if reply.truncated:
        blocks = [] if drop_reply else blocks[:-1]
    found = []
    for block in blocks[:most]:
        match = _FIELDS.match(block)
        if match is not None:
            given = match["input"].strip()
            found.append(("" if heuristics.no_input(given) else given, match["output"].strip()))
    return found or Reject("truncated" if reply.truncated else "malformed")
