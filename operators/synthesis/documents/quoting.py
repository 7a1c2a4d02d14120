"""Documents inside prompts: data that cannot be taken for the end of the document, a turn of the chat, or a control token.

Tokenizers read control tokens such as `<|im_end|>` wherever they stand, and templates of chats are plain text. In the copy
that goes into a prompt each such mark is therefore broken by a space; the document itself, and every offset into it, stays
as it is. Words such as "ignore all previous instructions" are left alone: they stand between the marks of the document, and
what follows from them instead of the document fails the checks on evidence.
"""

from __future__ import annotations

import re

OPEN, CLOSE = "<document>", "</document>"

_CONTROL = re.compile(
    r"<[|｜](?=[^<>\n]{1,64}[|｜]>)|<(?=/?(?:document|s|bos|eos|pad|unk|mask|think|tool_call|tool_response|start_of_turn|end_of_turn)>)"
    r"|\[(?=/?(?:INST|SYS|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\])|<<(?=/?SYS>>)"
    r"|(?m:^)\[(?=(?:system|user|assistant)\][ \t]*$)",
    re.IGNORECASE | re.MULTILINE,
)
_HARD = re.compile(
    r"<[|｜][^<>\s]{1,64}[|｜]>|</?(?:document|bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>", re.IGNORECASE
)
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def as_data(text: str, headings: tuple[str, ...] = ()) -> str:
    """The text between the marks of a document, with its place among the headings before it."""
    place = f"[{' > '.join(headings)}]\n" if headings else ""
    return f"{OPEN}\n{quoted(place + text)}\n{CLOSE}"


def quoted(text: str) -> str:
    """The text with control tokens and marks of chats broken by a space, and control characters replaced by one."""
    return _NOT_TEXT.sub(" ", _CONTROL.sub(lambda found: found.group() + " ", text))


def holds_control(text: str) -> str | None:
    """The first control token or mark of a chat in a text that a model wrote, if there is one."""
    found = _HARD.search(text)
    return found.group() if found else None
