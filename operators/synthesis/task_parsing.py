"""What a model said at each step of Self-Instruct, read: lists of tasks, labels, inputs, forms, in English and Chinese."""

from __future__ import annotations

import re
from functools import lru_cache

from operators.synthesis import heuristics
from operators.synthesis.prompts import Prompt
from operators.synthesis.requests import Reject, Reply

_ITEM = re.compile(r"^[ \t]*(?:(?:\d{1,3}[.)、．:：](?!\d)|Task \d+[.:]|任务 ?\d+[.:：])[ \t]*)+", re.MULTILINE)
_YES, _NO = re.compile(r"\s*(?:yes|是的?(?!否)|对)", re.IGNORECASE), re.compile(r"\s*(?:no|否|不是|不)", re.IGNORECASE)
_NEXT_LABEL = re.compile(r"^[ \t]*(?:\d+[.)、][ \t]*)?(?:Class )?(?:Label|标签)[ \t]*[:：]", re.MULTILINE | re.IGNORECASE)
_EXAMPLE = re.compile(r"^[ \t]*(?:Example|例子) ?\d+[ \t]*[:：.]?[ \t]*$", re.MULTILINE | re.IGNORECASE)
_AFTER_INPUT = re.compile(r"\n[ \t]*(?:Output|Task|Answer|输出|任务|答案|回答)[ \t]*[:：]", re.IGNORECASE)
# Names of fields at the beginning of a line. They are looked for one after the other, so that a reply of any length and
# shape is read in one pass.
_INSTRUCTION = re.compile(r"(?:\d+[.、][ \t]*)?(?:Instruction|指令)[ \t]*[:：]", re.IGNORECASE)
_INPUT = re.compile(r"^[ \t]*(?:\d+[.、][ \t]*)?(?:Input|输入)[ \t]*[:：]", re.MULTILINE | re.IGNORECASE)
_OUTPUT = re.compile(r"^[ \t]*(?:\d+[.、][ \t]*)?(?:Output|输出)[ \t]*[:：]", re.MULTILINE | re.IGNORECASE)
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
        fields = _task(block)
        if reply.truncated and number == len(blocks) - 1:
            found.append(Reject("truncated", detail=block))
        else:
            found.append(fields or Reject("malformed", detail=block))
    return found


def _task(block: str) -> tuple[str, str, str] | None:
    """(instruction, input, output) of one block, None when a field is missing."""
    head = _INSTRUCTION.match(block)
    given = _INPUT.search(block, head.end()) if head else None
    output = _OUTPUT.search(block, given.end()) if given else None
    if head is None or given is None or output is None:
        return None
    text = block[given.end() : output.start()].strip()
    return block[head.end() : given.start()].strip(), "" if heuristics.no_input(text) else text, block[output.end() :].strip()


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
    found = []
    for block in blocks[:most]:
        label, _, rest = block.strip().partition("\n")
        given = _INPUT.match(rest.lstrip())
        if given is not None:
            found.append((rest.lstrip()[given.end() :].strip(), label.strip()))
    return found or Reject("truncated" if reply.truncated else "malformed")


def parse_forms(reply: Reply, most: int, drop_reply: bool = False) -> list[tuple[str, str]] | Reject:
    """Up to `most` (input, output) pairs; the last of a reply that was cut is left out, as in the paper's code."""
    blocks = [block for block in _EXAMPLE.split(reply.text) if block.strip()]
    if reply.truncated:
        blocks = [] if drop_reply else blocks[:-1]
    found = []
    for block in blocks[:most]:
        output = _OUTPUT.search(block)
        if output is not None:
            before = block[: output.start()].strip()
            head = _INPUT.match(before)
            given = before[head.end() :].strip() if head else before
            found.append(("" if heuristics.no_input(given) else given, block[output.end() :].strip()))
    return found or Reject("truncated" if reply.truncated else "malformed")
