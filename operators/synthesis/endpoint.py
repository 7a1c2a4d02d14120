"""Generation by a server with OpenAI's chat interface: another team's vLLM, a gateway, a provider.

One thread with an event loop serves all sessions of an engine. How many requests are under way adapts as TCP does
(additive increase, multiplicative decrease: Chiu and Jain 1989): more while the server answers, half as many when it
says 429 or 503 or lets a request time out. What fails is asked again after exponentially longer, jittered waits; a
server that is away for less than `give_up_s` costs time and no row.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

import aiohttp
import orjson
from pydantic import Field, field_validator

from operators.config import Settings
from operators.synthesis import chat_api
from operators.synthesis.chat_api import EXTRAS, Extra, Trouble
from operators.synthesis.packaged import ModelError
from operators.synthesis.requests import PROMPT_TOO_LONG, REFUSED, EngineError, Reply, Request
from operators.tables import content_hash

_log = logging.getLogger(__name__)

_FIRST = 8  # requests under way before the server has shown what it bears
_CONNECT_S = 15.0
_LONGEST_WAIT_S = 60.0  # between two attempts of one request
_LONGEST_PAUSE_S = 300.0  # that a server's Retry-After can impose
_REFUSED_IN_ROW = 64  # refusals without one reply between them after which the server is wrong, not the requests
_LEFT_OVER = 8  # requests that may be given up when nothing but they is left and they alone fail
_SAY_EVERY_S = 60.0


class EndpointSettings(Settings):
    """Where the server is and how hard it may be pressed."""

    url: str = Field(description="base address, such as http://127.0.0.1:8000/v1; /chat/completions is added")
    key_variable: str = Field(
        default="OPENAI_API_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable that holds the key, sent to this server and written nowhere; it may be unset",
    )
    allow_plain_http: bool = Field(default=False, description="send the key without encryption to a server on another machine")
    revision: str | None = Field(
        default=None, description="what names the weights behind the model's name; without it the address does"
    )
    concurrency: int = Field(default=64, ge=1, le=4096, description="requests under way at most; fewer while the server complains")
    timeout_s: float = Field(default=600.0, gt=0, description="longest time that one request may take")
    attempts: int = Field(
        default=8,
        ge=1,
        description="times that a request may fail (errors of the server, broken answers, timeouts) while others succeed, before "
        "it is refused; 429, 503 and an unreachable server do not count",
    )
    backoff_s: float = Field(default=0.5, gt=0, le=60, description="wait before the second attempt; doubles with each, with jitter")
    give_up_s: float = Field(
        default=600.0, gt=0, description="time without any reply after which the run ends; it goes on later from the reply cache"
    )
    max_reply_bytes: int = Field(default=8 << 20, ge=1024, description="longest answer that is read, bytes of JSON")
    require_usage: bool = Field(
        default=True,
        description="a server that reports no token counts ends the run, for no cap or price could be kept; "
        "false: its replies count as 0 tokens",
    )
    extras: list[Extra] | None = Field(
        default=None,
        description="parameters beyond OpenAI's interface that the server knows; requests that need another are refused. "
        "By default all if the server calls itself vLLM or SGLang, else none",
    )
    length_parameter: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="what the server calls the longest reply"
    )
    defuse: bool = Field(
        default=True,
        description="take apart what looks like a model's control token (<|im_end|>) in messages, so that no text ends its message",
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        parts = urlsplit(value.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the address must begin with http:// or https:// and name a host")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("the address must hold no user, password, query or fragment; a key goes into `key_variable`")
        if any(mark.isspace() or not mark.isprintable() for mark in value.strip()):
            raise ValueError("the address holds white space or control characters")
        _ = parts.port  # raises ValueError when it is no number
        return value.strip().rstrip("/").removesuffix("/chat/completions")

    def revision_of(self, model: str) -> str:
        """The model's name with the revision that the user states, or with the address; and `defuse` where it is off, which
        changes prompts."""
        return content_hash(["endpoint", model, self.revision or self.url, *([] if self.defuse else ["not defused"])])

    def key(self) -> str:
        """The key, or nothing. Raises ModelError when it cannot or must not be sent; contacts nobody."""
        key = os.environ.get(self.key_variable, "").strip()
        if key and not (key.isascii() and key.isprintable()):
            raise ModelError(f"endpoint.key_variable: the value of {self.key_variable} holds characters that no key has")
        if key and not self.allow_plain_http and urlsplit(self.url).scheme == "http" and not _is_loopback(self.url):
            raise ModelError(
                f"endpoint.url: the key in {self.key_variable} would go to {self.url} unencrypted; use https://, unset the "
                "variable or name another one as key_variable if the server needs no key, or set allow_plain_http: true"
            )
        return key


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class EndpointEngine:
    """A handle on a server (see requests.TextEngine). It needs no Ray. `open` may be called by several threads at once."""

    def __init__(self, model: str, settings: EndpointSettings) -> None:
        """Contacts nobody. Raises ModelError when the key must not be sent."""
        settings.key()
        self.model, self.settings = model, settings
        self._lock = threading.Lock()
        self._client: _Client | None = None

    @property
    def revision(self) -> str:
        return self.settings.revision_of(self.model)

    @property
    def in_flight(self) -> int:
        return 2 * self.settings.concurrency

    def start(self) -> None:
        """Nothing has to be loaded."""

    def open(self) -> EndpointSession:
        """A stream of requests and replies of one caller; after a failure the server is tried afresh."""
        with self._lock:
            if self._client is None or self._client.failure is not None:
                if self._client is not None:
                    self._client.stop()
                self._client = _Client(self.model, self.settings)
            return EndpointSession(self._client)

    def stop(self) -> None:
        """Take back what is under way and end the thread; the engine can be opened again."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.stop()


class EndpointSession:
    """Requests of one caller at a server (see requests.EngineSession)."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._arrived: list[tuple[int, Reply]] = []
        self._changed = threading.Condition()
        self.closed = False

    def submit(self, requests: Sequence[tuple[int, Request]]) -> None:
        if self.closed:
            raise EngineError("the session is closed")
        self._client.submit(self, requests)

    def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._client.failure is not None, timeout_s)
            if not self._arrived and self._client.failure is not None:
                raise EngineError(self._client.failure)
            arrived, self._arrived = self._arrived, []
        return arrived

    def close(self) -> None:
        self.closed = True
        self._client.drop(self)

    def deliver(self, number: int, reply: Reply) -> None:
        with self._changed:
            self._arrived.append((number, reply))
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


@dataclass(eq=False)
class _Item:
    """A request until its reply is delivered."""

    session: EndpointSession
    number: int
    request: Request
    tries: int = 0
    faults: int = 0
    failed_at: float | None = None  # when it failed first
    task: asyncio.Task[None] | None = None


class _Client:
    """The thread and its loop. Everything but `submit`, `drop`, `stop` and `failure` belongs to the loop's thread."""

    def __init__(self, model: str, settings: EndpointSettings) -> None:
        self.failure: str | None = None
        self._model, self._settings = model, settings
        key = settings.key()
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "danlu", "Content-Type": "application/json"}
        self._has_key = bool(key)
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._hide = key
        self._extras: frozenset[Extra] | None = None if settings.extras is None else frozenset(settings.extras)
        self._queue: deque[_Item] = deque()
        self._items: set[_Item] = set()  # queued, under way, or waiting for their next attempt
        self._active = 0
        self._limit = float(min(_FIRST, settings.concurrency))
        self._doubling = True  # until the first sign of too much, as in TCP's slow start
        self._cut_at = self._paused_until = float("-inf")
        self._answered_at = self._waiting_since = float("-inf")
        self._answers = self._refused_in_row = 0
        self._said_at = float("-inf")
        self._http: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"endpoint {settings.url}", daemon=True)
        self._thread.start()

    def submit(self, session: EndpointSession, requests: Sequence[tuple[int, Request]]) -> None:
        items = [_Item(session, number, request) for number, request in requests]
        self._call(self._enqueue, items)

    def drop(self, session: EndpointSession) -> None:
        """Forget what a session has not been given; what is under way for it is taken back."""
        self._call(self._forget, session)

    def stop(self) -> None:
        self._call(self._end)
        self._thread.join(timeout=10)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended, with a failure that `collect` raises
            self.failure = self.failure or "the engine was stopped"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            if self._http is not None:
                self._loop.run_until_complete(self._http.close())
            pending = asyncio.all_tasks(self._loop)
            for task in pending:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        finally:
            self._loop.close()

    def _end(self) -> None:
        self._fail("the engine was stopped")
        self._loop.stop()

    def _enqueue(self, items: list[_Item]) -> None:
        if self.failure is not None:
            for session in {item.session for item in items}:
                session.wake()
            return
        if not self._items:
            self._waiting_since = self._loop.time()
        self._items.update(items)
        self._queue.extend(items)
        self._pump()

    def _forget(self, session: EndpointSession) -> None:
        for item in [item for item in self._items if item.session is session]:
            self._items.discard(item)
            if item.task is not None:
                item.task.cancel()
        self._queue = deque(item for item in self._queue if item.session is not session)

    def _fail(self, message: str) -> None:
        """End everything: every session raises this from its next `collect` that has nothing to give."""
        if self.failure is None:
            self.failure = self._hidden(message)
        items, self._items = self._items, set()
        self._queue.clear()
        for item in items:
            if item.task is not None:
                item.task.cancel()
        for session in {item.session for item in items}:
            session.wake()

    def _hidden(self, text: str) -> str:
        """A text without the key, which a server may have repeated."""
        return text.replace(self._hide, "[key]") if self._hide else text

    def _pump(self) -> None:
        """Send what may be sent now."""
        if self._loop.time() < self._paused_until:
            return
        while self._queue and self._active < max(1, int(self._limit)):
            item = self._queue.popleft()
            self._active += 1
            item.task = self._loop.create_task(self._attempt(item))
            item.task.add_done_callback(functools.partial(self._freed, item))

    def _freed(self, item: _Item, task: asyncio.Task[None]) -> None:
        """An attempt is over, cancelled before its first step perhaps: somebody else may go."""
        item.task = None
        self._active -= 1
        if not task.cancelled() and (error := task.exception()) is not None:  # a defect must not leave the callers waiting
            self._fail(f"asking {self._settings.url} failed: {type(error).__name__}: {error}")
        self._pump()

    async def _attempt(self, item: _Item) -> None:
        began = self._loop.time()
        outcome = await self._ask(item.request)
        if item not in self._items:
            return
        if isinstance(outcome, Reply):
            self._answer(item, outcome)
        elif outcome.kind == "fatal":
            self._fail(await self._explain(outcome))
        else:
            self._again(item, outcome, began)

    def _answer(self, item: _Item, reply: Reply) -> None:
        self._items.discard(item)
        if reply.finish_reason == REFUSED:
            reply = Reply(
                self._hidden(reply.text), REFUSED, reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens
            )  # fmt: skip
            if not chat_api.is_filtered(reply):
                self._refused_in_row += 1
        else:
            self._refused_in_row = 0
        if self._refused_in_row >= _REFUSED_IN_ROW:
            self._fail(f"{self._settings.url} refused {self._refused_in_row} requests in a row; the last: {reply.text}")
            return
        self._waiting_since = self._loop.time()
        if reply.finish_reason not in (REFUSED, PROMPT_TOO_LONG):
            self._answers += 1
            self._answered_at = self._loop.time()
        if self._active >= int(self._limit):
            self._limit = min(self._settings.concurrency, self._limit + (1 if self._doubling else 1 / self._limit))
        item.session.deliver(item.number, reply)

    def _again(self, item: _Item, trouble: Trouble, began: float) -> None:
        """Plan the next attempt of a request, or see that there is none."""
        settings, now = self._settings, self._loop.time()
        item.tries += 1
        item.faults += trouble.kind == "fault"
        item.failed_at = now if item.failed_at is None else item.failed_at
        if trouble.slow and began >= self._cut_at:  # requests that began before the last cut say nothing about it
            self._limit, self._doubling, self._cut_at = max(1.0, self._limit / 2), False, now
        if item.faults >= settings.attempts and self._answered_at > item.failed_at:
            self._give_up(item, trouble)
            return
        if item.tries >= 2 and now - self._waiting_since > settings.give_up_s:
            left_over = [other for other in self._items if other.faults >= settings.attempts]
            if self._answers and len(left_over) == len(self._items) <= _LEFT_OVER:
                for other in left_over:
                    self._give_up(other, trouble)
                return
            self._fail(
                f"{settings.url} has given no reply for {now - self._waiting_since:.0f} s ({len(self._items)} requests wait; the "
                f"last trouble: {trouble.text}); what was received is kept: run the same command again when the server answers"
            )
            return
        self._say(f"{settings.url}: {trouble.text}; asking again ({len(self._items)} requests wait)", now)
        if trouble.wait_s is not None and trouble.kind == "busy":
            self._paused_until = max(self._paused_until, now + min(trouble.wait_s, _LONGEST_PAUSE_S))
            self._loop.call_at(self._paused_until, self._pump)
        wait = min(_LONGEST_WAIT_S, settings.backoff_s * 2 ** min(item.tries - 1, 20)) * random.uniform(0.5, 1.0)
        self._loop.call_later(max(wait, min(trouble.wait_s or 0.0, _LONGEST_PAUSE_S)), self._requeue, item)

    def _requeue(self, item: _Item) -> None:
        if item in self._items:
            self._queue.appendleft(item)  # the oldest first: its caller may wait for nothing else
            self._pump()

    def _give_up(self, item: _Item, trouble: Trouble) -> None:
        text = f"given up after {item.faults} failed attempts while other requests were answered; the last: {trouble.text}"
        self._answer(item, Reply(text, REFUSED, 0, 0))

    def _say(self, line: str, now: float) -> None:
        if now - self._said_at > _SAY_EVERY_S:
            self._said_at = now
            _log.warning("%s", self._hidden(line))

    async def _ask(self, request: Request) -> Reply | Trouble:
        """One attempt."""
        needed = chat_api.needed_extras(request)
        if needed:
            known = await self._known_extras()
            if isinstance(known, Trouble):
                return known
            if missing := [name for name in needed if name not in known]:
                return chat_api.refuse_extras(missing)
        try:
            body = chat_api.body_of(self._model, request, self._settings.length_parameter, self._settings.defuse)
        except orjson.JSONDecodeError as error:
            return Reply(f"the request's schema is no JSON: {error}", REFUSED, 0, 0)
        answer = await self._exchange("POST", "/chat/completions", body)
        if isinstance(answer, Trouble):
            return answer
        return chat_api.read_answer(*answer, self._settings.require_usage)

    async def _known_extras(self) -> frozenset[Extra] | Trouble:
        """What the server understands beyond OpenAI's interface: as set, or as it says whose model it serves."""
        if self._extras is None:
            answer = await self._exchange("GET", "/models")
            if isinstance(answer, Trouble):
                return answer
            status, _, body = answer
            if status in (401, 403) or status >= 500 or status in (408, 409, 429):
                found = chat_api.read_answer(*answer)
                return found if isinstance(found, Trouble) else Trouble("fault", found.text)
            owners = {owner.lower() for _, owner in chat_api.model_names(body)} if status == 200 else set()
            self._extras = frozenset(EXTRAS) if owners & {"vllm", "sglang"} else frozenset()
        return self._extras

    async def _exchange(
        self, method: str, path: str, body: bytes | None = None, timeout_s: float | None = None
    ) -> tuple[int, dict[str, str], bytes] | Trouble:
        """One HTTP request: status, headers, whole body; or what stood in its way."""
        settings, timeout_s = self._settings, timeout_s or self._settings.timeout_s
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),  # servers drop idle connections after 5 s
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._http.request(
                    method, settings.url + path, data=body, headers=self._headers, allow_redirects=False
                ) as response,
            ):
                if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                    return Trouble("fault", "the answer is compressed, which was not asked for")
                pieces, size = [], 0
                async for piece in response.content.iter_chunked(1 << 16):
                    pieces.append(piece)
                    size += len(piece)
                    if size > settings.max_reply_bytes:
                        response.close()
                        return Trouble("fault", f"the answer is longer than max_reply_bytes: {settings.max_reply_bytes}")
                return response.status, dict(response.headers), b"".join(pieces)
        except aiohttp.ConnectionTimeoutError:
            return Trouble("down", f"no connection within {_CONNECT_S:g} s")
        except TimeoutError:
            return Trouble("fault", f"no answer within {timeout_s:g} s", slow=True)
        except aiohttp.ClientConnectorCertificateError as error:
            return Trouble("fatal", f"its certificate is not trusted: {chat_api.printable(str(error))}")
        except aiohttp.ClientConnectorError as error:
            return Trouble("down", chat_api.printable(str(error)))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Trouble("fault", f"{type(error).__name__}: {chat_api.printable(str(error))}")

    async def _explain(self, trouble: Trouble) -> str:
        """What a user can do about a fatal answer."""
        settings = self._settings
        text = f"{settings.url}: {trouble.text.rstrip('.')}"
        if trouble.status in (401, 403):
            state = "holds a key that the server does not accept" if self._has_key else "is not set"
            return f"{text}. The environment variable {settings.key_variable} {state}; set it (or name another as key_variable)"
        if trouble.status == 404:
            answer = await self._exchange("GET", "/models", timeout_s=_CONNECT_S)
            names = [] if isinstance(answer, Trouble) or answer[0] != 200 else [name for name, _ in chat_api.model_names(answer[2])]
            if not names:
                return f"{text}. Is `url` the base address (…/v1)? It lists no models at {settings.url}/models"
            listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            return f"{text}. generator.model is {self._model!r}; the server lists: {listed}"
        return text


__all__ = ["EndpointEngine", "EndpointSession", "EndpointSettings"]
