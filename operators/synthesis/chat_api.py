"""OpenAI's chat interface as pure functions: a request becomes a body, an answer becomes a reply or what went wrong.

What a server says is data: bounded, taken for text, never trusted to have the fields that it should have.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from operators.synthesis.requests import PROMPT_TOO_LONG, REFUSED, Reply, Request

Extra = Literal["top_k", "repetition_penalty", "continuation"]
EXTRAS: tuple[Extra, ...] = ("top_k", "repetition_penalty", "continuation")
"""What vLLM and SGLang understand beyond OpenAI's own interface."""

_SAID = 300  # characters of a server's message that are kept
_COUNT = 1 << 31  # no reply has that many tokens

_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|<(?:start|end)_of_turn>|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]|<</?SYS>>"
)
"""Spellings of control tokens in the chat templates of the common model families."""

_TOO_LONG = re.compile(
    r"context[_ ](?:length|window)|maximum context|too many (?:input |prompt )?tokens"
    r"|(?:prompt|input|messages?)\b[^.]{0,40}\btoo (?:long|large)"
    r"|exceeds? (?:the )?(?:model's )?(?:maximum|max|limit)[^.]{0,40}(?:input|prompt|tokens)",
    re.IGNORECASE,
)
_PROMPT_TOKENS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\((\d+) in the (?:messages|prompt)",
        r"resulted in (\d+) tokens",
        r"(?:at least|contains|has|with) (\d+) (?:input |prompt )?tokens",
        r"parameter=input_tokens, value=(\d+)",
    )
]


@dataclass(frozen=True)
class Trouble:
    """Why there is no reply (yet).

    `busy`: the server wants less or later, and `down`: it cannot be reached; neither says anything about the request.
    `fault`: this request failed, and may not the next time. `fatal`: no request will do better until somebody acts.
    `slow`: it asks for fewer requests at a time. `wait_s`: how long it asks to be left alone.
    """

    kind: Literal["busy", "down", "fault", "fatal"]
    text: str
    slow: bool = False
    wait_s: float | None = None
    status: int = 0


def needed_extras(request: Request) -> list[Extra]:
    """The parameters beyond OpenAI's interface without which a request would be another request."""
    wanted: list[Extra] = []
    if request.sampling.top_k:
        wanted.append("top_k")
    if request.sampling.repetition_penalty != 1:
        wanted.append("repetition_penalty")
    if request.messages and request.messages[-1][0] == "assistant":
        wanted.append("continuation")
    return wanted


def refuse_extras(missing: list[Extra]) -> Reply:
    """The reply to a request that the server's interface cannot express."""
    what = {
        "top_k": "`top_k`",
        "repetition_penalty": "`repetition_penalty`",
        "continuation": "a last assistant message that is to be continued",
    }
    return _refused(
        f"the request needs {' and '.join(what[name] for name in missing)}, which OpenAI's interface does not have; "
        f"if the server knows it as vLLM and SGLang do, set generator.endpoint.extras: [{', '.join(missing)}]"
    )


def body_of(model: str, request: Request, length_parameter: str, defuse: bool) -> bytes:
    """The JSON body of a request. Only what differs from the interface's defaults is sent, so that strict servers take it."""
    sampling = request.sampling
    data: dict[str, Any] = {
        "model": model,
        "messages": [{"role": role, "content": _text(content, defuse)} for role, content in request.messages],
        "temperature": sampling.temperature,
        "seed": request.seed,
        length_parameter: sampling.max_tokens,
    }
    neutral = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "top_k": 0, "stop": []}
    data |= {name: value for name, default in neutral.items() if (value := getattr(sampling, name)) != default}
    if "continuation" in needed_extras(request):
        data |= {"add_generation_prompt": False, "continue_final_message": True}
    if request.json_schema is not None:
        schema = {"name": "reply", "strict": True, "schema": orjson.loads(request.json_schema)}
        data["response_format"] = {"type": "json_schema", "json_schema": schema}
    return orjson.dumps(data)


def _text(content: str, defuse: bool) -> str:
    """Text as data: what looks like a control token is taken apart, and what is not Unicode (half a surrogate) replaced."""
    if defuse:
        content = _CONTROL.sub(lambda found: f"{found[0][0]} {found[0][1:]}", content)
    return content if content.isascii() else content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_answer(status: int, headers: Mapping[str, str], body: bytes, require_usage: bool = True) -> Reply | Trouble:
    """What a server's answer means. `body` is whole, bounded and not compressed."""
    if status == 200:
        return _read_reply(body, require_usage)
    if 300 <= status < 400:
        target = printable(headers.get("Location", "nowhere"))
        return Trouble("fatal", f"it redirects to {target}; redirects are not followed: write the final address as `url`")
    said, code = _error(body)
    text = f"HTTP {status}: {said}"
    if status == 429 and (code == "insufficient_quota" or "insufficient_quota" in said):
        return Trouble("fatal", text, status=status)
    if status in (429, 503, 529):
        return Trouble("busy", text, slow=True, wait_s=retry_after(headers.get("Retry-After")), status=status)
    if status in (408, 409, 425) or status >= 500:
        return Trouble("fault", text, slow=status in (408, 504), wait_s=retry_after(headers.get("Retry-After")), status=status)
    if code == "context_length_exceeded" or (status in (400, 413, 422) and _TOO_LONG.search(said)):
        found = next((match for pattern in _PROMPT_TOKENS if (match := pattern.search(said))), None)
        return Reply("", PROMPT_TOO_LONG, min(int(found[1]), _COUNT) if found and len(found[1]) < 12 else 0, 0)
    if status in (401, 402, 403, 404, 405, 407):
        return Trouble("fatal", text, status=status)
    if 400 <= status < 500:
        return _refused(text)
    return Trouble("fault", text, status=status)


def is_filtered(reply: Reply) -> bool:
    """A refusal by what the prompt says, not by how it was asked."""
    return reply.finish_reason == REFUSED and ("content_filter" in reply.text or "content management policy" in reply.text)


def _read_reply(body: bytes, require_usage: bool) -> Reply | Trouble:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        return Trouble("fault", f"the answer is no JSON ({error}): {printable(body[:80].decode('utf-8', 'replace'))!r}")
    try:
        choice = data["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = _content(message)
        usage = data.get("usage")
        counts = (0, 0, 0) if usage is None else _usage(usage)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return Trouble("fault", f"the answer lacks what a chat completion has: {type(error).__name__} {printable(str(error))}")
    if not isinstance(finish, str) or finish in ("abort", "error"):
        return Trouble("fault", f"the reply was not finished (finish_reason {finish!r})")
    if usage is None and require_usage:
        return Trouble(
            "fatal",
            "its answers report no `usage`, so that neither a token cap nor a price can be kept; "
            "set generator.endpoint.require_usage: false to count its replies as 0 tokens",
        )
    prompt, completion, cached = counts
    if finish == "content_filter":
        return Reply(f"content_filter: {printable(text)}", REFUSED, prompt, completion, cached)
    return Reply(text, "length" if finish == "length" else "stop", prompt, completion, cached)


def _content(message: dict[str, Any]) -> str:
    """The text of a message; some servers send it as parts, or none where only a refusal or thoughts were written."""
    content = message.get("content")
    if content is None:
        content = message.get("refusal") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise TypeError(f"content is {type(content).__name__}")
    return content


def _usage(usage: dict[str, Any]) -> tuple[int, int, int]:
    details = usage.get("prompt_tokens_details") or {}
    counts = usage["prompt_tokens"], usage.get("completion_tokens", 0), details.get("cached_tokens") or 0
    for count in counts:
        if type(count) is not int or not 0 <= count < _COUNT:
            raise ValueError(f"token count {count!r}"[:80])
    return counts


def _error(body: bytes) -> tuple[str, str]:
    """The message and the code in the body of an error, whatever its shape."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return printable(body[: 4 * _SAID].decode("utf-8", "replace")), ""
    found = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(found, dict):
        return printable(str(found)), ""
    said = next((found[name] for name in ("message", "detail", "error") if found.get(name)), found)
    return printable(said if isinstance(said, str) else str(said)), str(found.get("code") or found.get("type") or "")


def _refused(text: str) -> Reply:
    return Reply(text, REFUSED, 0, 0)


def printable(text: str) -> str:
    """A server's words as one short line without control characters."""
    text = " ".join("".join(mark if mark.isprintable() else " " for mark in text[: 4 * _SAID]).split())
    return text if len(text) <= _SAID else text[:_SAID] + "…"


def retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3: seconds or a date); None when it says nothing usable."""
    if value is None:
        return None
    value = value.strip()
    if re.fullmatch(r"\d{1,9}(?:\.\d{1,9})?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def model_names(body: bytes) -> list[tuple[str, str]]:
    """(name, owner) of the models that an answer of /models lists; empty when it lists none."""
    try:
        entries = orjson.loads(body)["data"]
        return [(printable(str(entry["id"])), str(entry.get("owned_by", ""))) for entry in entries]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return []
