"""A reply that was received is never lost and never asked for again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from operators.stage import Cancelled
from operators.synthesis.cache import ReplyCache
from operators.synthesis.requests import Reply, Request, SamplingSettings, request_seed
from tests.operators.synthesis.recorded import Recording, generator

REQUEST = Request((("user", "写一首诗"),), SamplingSettings(), 5)


def requests(count: int, tokens: int = 10) -> list[Request]:
    return [Request((("user", f"question {n}"),), SamplingSettings(max_tokens=tokens), request_seed(1, n)) for n in range(count)]


@pytest.mark.parametrize(
    "other",
    [
        Request((("system", ""), ("user", "写一首诗")), SamplingSettings(), 5),
        Request((("user", "写一首诗 "),), SamplingSettings(), 5),
        Request((("user", "写一首诗"),), SamplingSettings(top_p=0.9), 5),
        Request((("user", "写一首诗"),), SamplingSettings(), 6),
        Request((("user", "写一首诗"),), SamplingSettings(), 5, 1),
    ],
)
def test_every_part_of_a_request_is_in_its_key(other: Request) -> None:
    assert other.key("r") != REQUEST.key("r")
    assert REQUEST.key("r") != REQUEST.key("another model")


def test_replies_survive_reopening_with_any_text(tmp_path: Path) -> None:
    replies = [Reply(text, "stop", 3, 4) for text in ("", "line\nbreak", "\x00", "中文🙂", 'quote " \\', "x" * 100_000)]
    cache = ReplyCache(str(tmp_path), "a")
    cache.put([(request.key("r"), reply) for request, reply in zip(requests(6), replies, strict=True)])
    again = ReplyCache(str(tmp_path), "b")
    assert [again.get(request.key("r")) for request in requests(6)] == replies
    assert again.get(REQUEST.key("r")) is None


def test_a_torn_last_line_costs_that_reply_alone(tmp_path: Path) -> None:
    cache = ReplyCache(str(tmp_path), "a")
    for request in requests(3):
        cache.put([(request.key("r"), Reply("ok", "stop", 1, 1))])
    file = tmp_path / "a.jsonl"
    file.write_bytes(file.read_bytes()[:-7])
    again = ReplyCache(str(tmp_path), "a")
    assert [again.get(r.key("r")) is not None for r in requests(3)] == [True, True, False]
    again.put([(requests(3)[2].key("r"), Reply("new", "stop", 1, 1))])
    assert len(ReplyCache(str(tmp_path), "a")) == 3
    assert ReplyCache(str(tmp_path), "a").get(requests(3)[2].key("r")) == Reply("new", "stop", 1, 1)


_WRITER = """
import sys
from operators.synthesis.cache import ReplyCache
from operators.synthesis.requests import Reply
cache = ReplyCache(sys.argv[1], sys.argv[2])
for n in range(10**6):
    cache.put([(f"{int(sys.argv[3]) * 10**7 + n:032x}", Reply(f"reply {n} " * 50, "stop", 1, 1))])
    print(n, flush=True)
"""


def test_every_acknowledged_reply_survives_kill_9_of_two_writers_on_one_file(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), "shared", str(k)], stdout=subprocess.PIPE, text=True)
        for k in (1, 2)
    ]
    acknowledged = []
    for writer in writers:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) >= 20:
                break
    time.sleep(0.1)
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
    for writer in writers:
        assert writer.stdout is not None
        acknowledged.append(max([20, *(int(line) for line in writer.stdout.read().split() if line.isdigit())]))
        writer.wait()
    cache = ReplyCache(str(tmp_path), "shared")
    for k, top in zip((1, 2), acknowledged, strict=True):
        for n in range(top):
            reply = cache.get(f"{k * 10**7 + n:032x}")
            assert reply is not None
            assert reply.text == f"reply {n} " * 50


def test_a_stopped_run_asks_only_for_what_it_had_not_received(tmp_path: Path) -> None:
    first = Recording(lambda r: r.messages[0][1].upper(), stop_after=5)
    with pytest.raises(ConnectionError):
        generator(first, str(tmp_path)).ask(requests(12))
    second = Recording(lambda r: r.messages[0][1].upper())
    ours = generator(second, str(tmp_path))
    replies = ours.ask(requests(12))
    assert len(second.asked) == 7
    assert ours.cache_hits == 5
    assert [reply.text for reply in replies if reply] == [f"QUESTION {n}" for n in range(12)]


def test_the_token_cap_is_never_passed_and_is_the_same_after_a_restart(tmp_path: Path) -> None:
    recording = Recording(lambda r: Reply("x", "stop", 1, 7))
    ours = generator(recording, str(tmp_path), cap=50)
    replies = ours.ask(requests(30))
    answered = [reply is not None for reply in replies]
    assert ours.usage.completion_tokens <= 50
    assert answered == sorted(answered, reverse=True), "requests are asked in order"
    assert sum(answered) == 6, "six replies of 7 tokens leave 8, and the next could take 10"
    again = generator(Recording(lambda r: pytest.fail("cached")), str(tmp_path), cap=50)
    assert again.ask(requests(30)) == replies


def test_equal_requests_are_drawn_once(tmp_path: Path) -> None:
    recording = Recording(lambda r: "same")
    assert len(set(generator(recording, str(tmp_path)).ask([REQUEST] * 5))) == 1
    assert len(recording.asked) == 1


def test_stopping_keeps_what_was_received(tmp_path: Path) -> None:
    def stop_after_three(request: Request) -> str:
        if len(recording.asked) == 3:
            player.cancelled.set()
        return "a"

    recording = Recording(stop_after_three)
    player = generator(recording, str(tmp_path))
    with pytest.raises(Cancelled):
        player.ask(requests(8))
    assert len(ReplyCache(str(tmp_path), "test")) == 3
    assert os.listdir(tmp_path) == ["test.jsonl"]
