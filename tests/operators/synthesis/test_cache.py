"""A reply that was received is never lost and never asked for again."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import storage
from operators.stage import Cancelled
from operators.synthesis.cache import ReplyCache, _line
from operators.synthesis.reply_index import ReplyIndex
from operators.synthesis.requests import Reply, Request, SamplingSettings, request_seed
from tests.cluster.object_store import BUCKET, Line
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


def key(number: int) -> str:
    return f"{number:032x}"


def answer(number: int) -> Reply:
    return Reply(f"回答 {number}\n" * (number % 7), "stop", number, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3), st.integers(0, 2**40)), max_size=400))
def test_the_index_finds_what_a_dictionary_finds(entries: list[tuple[int, int, int]]) -> None:
    """Few tags and files, so that slots collide, the table wraps around and grows."""
    index, reference = ReplyIndex(), {}
    for tag, file, offset in entries:
        tag = (2**32 - 1 - tag) if tag % 2 else tag
        index.add(np.array([tag], np.uint32), file, np.array([offset]))
        reference.setdefault(tag, []).append((file, offset))
    assert len(index) == len(entries)
    for tag in range(45):
        for wanted in (tag, 2**32 - 1 - tag):
            assert index.find(wanted) == sorted(reference.get(wanted, []))


def test_a_large_index_takes_few_bytes_a_reply_and_finds_all() -> None:
    index, random = ReplyIndex(), np.random.default_rng(5)
    tags, offsets = random.integers(0, 2**32, 300_000, np.uint32), np.arange(300_000) * 1000
    for begin in range(0, 300_000, 1000):
        index.add(tags[begin : begin + 1000], 2, offsets[begin : begin + 1000])
    assert index.nbytes <= 24 * 300_000
    assert all((2, 1000 * n) in index.find(int(tags[n])) for n in range(0, 300_000, 97))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=60)), max_size=12), st.booleans(), st.integers(1, 300))
def test_lines_are_found_whatever_stands_between_them_and_however_they_are_read(
    pieces: list[tuple[int, bytes]], torn: bool, block: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file, expected, junk = Path(directory) / "a.jsonl", set(), 0
        with file.open("wb") as stream:
            for number, noise in pieces:
                lines = noise.split(b"\n")
                stream.write(noise + b"\n" if noise else b"")
                junk += sum(bool(line) for line in lines)
                stream.write(_line(key(number), answer(number)))
                expected.add(number)
            if torn:
                stream.write(_line(key(99), answer(99))[:-9])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("operators.synthesis.cache._BLOCK", block)
            cache = ReplyCache(directory, "b")
        assert cache.damaged == junk + torn
        assert {n for n in range(100) if cache.get(key(n)) is not None} == expected
        assert all(cache.get(key(n)) == answer(n) for n in expected)


def test_a_damaged_reply_is_counted_and_drawn_again(tmp_path: Path) -> None:
    cache = ReplyCache(str(tmp_path), "a")
    cache.put([(key(n), answer(n)) for n in range(4)])
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"text":', b'"text";')  # begins and ends as a reply does
    lines[2] = lines[2].replace(b'"prompt_tokens":2', b'"prompt_tokens":"2"')
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    again = ReplyCache(str(tmp_path), "a")
    assert [again.get(key(n)) for n in range(4)] == [answer(0), None, None, answer(3)]
    assert again.damaged == 2
    again.put([(key(1), Reply("new", "stop", 1, 1))])
    assert ReplyCache(str(tmp_path), "a").get(key(1)) == again.get(key(1)) == Reply("new", "stop", 1, 1)


def test_of_two_replies_to_one_request_the_first_counts_also_after_reopening(tmp_path: Path) -> None:
    one, other = ReplyCache(str(tmp_path), "a"), ReplyCache(str(tmp_path), "a")
    one.put([(key(1), Reply("first", "stop", 1, 1)), (key(1), Reply("twice", "stop", 1, 1))])
    other.put([(key(1), Reply("second", "stop", 1, 1))])  # it had not seen the first
    other.put([(key(1), Reply("third", "stop", 1, 1))])
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 2
    reopened = ReplyCache(str(tmp_path), "a").get(key(1))
    assert reopened == one.get(key(1)) == Reply("first", "stop", 1, 1)


def test_several_threads_and_caches_append_to_one_file(tmp_path: Path) -> None:
    def write(part: int) -> None:
        cache = ReplyCache(str(tmp_path), "a")
        for n in range(part * 100, part * 100 + 100, 5):
            cache.put([(key(n + k), answer(n + k)) for k in range(5)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    cache = ReplyCache(str(tmp_path), "b")
    assert [cache.get(key(n)) for n in range(400)] == [answer(n) for n in range(400)]
    assert cache.damaged == 0


def test_on_an_object_store_every_batch_is_an_object_and_replies_are_read_without_asking_the_store(line: Line) -> None:
    folder = f"s3://{BUCKET}/replies"
    cache = ReplyCache(folder, "a")
    for begin in range(0, 90, 3):
        cache.put([(key(n), answer(n)) for n in range(begin, begin + 3)])
    assert len(storage.list_files(folder)) == 30
    again = ReplyCache(folder, "b")
    storage.delete(folder)
    asked = line.answered
    for held in (cache, again):
        assert [held.get(key(n)) for n in range(90)] == [answer(n) for n in range(90)]
    assert again.get(key(301)) is None
    assert line.answered == asked


def test_reading_keeps_few_files_open(tmp_path: Path) -> None:
    def opened() -> int:
        return sum(Path(f"/proc/self/fd/{name}").resolve().is_relative_to(tmp_path) for name in os.listdir("/proc/self/fd"))

    cache = ReplyCache(str(tmp_path), "a")
    cache.put([(key(n), answer(n)) for n in range(2000)])
    assert opened() == 1
    assert all(cache.get(key(n)) == answer(n) for n in range(2000))
    cache.put([(key(n), answer(n)) for n in range(2000, 2100)])
    assert opened() == 1
    del cache
    gc.collect()
    assert opened() == 0


def wide(begin: int) -> list[tuple[str, Reply]]:
    """A batch of ten replies, 16 kB together."""
    return [(key(n), Reply("词" * 500, "stop", n, 1)) for n in range(begin, begin + 10)]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_an_error_that_damages_nothing_and_writing_goes_on_when_there_is_room(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(tmp_path)], check=False, capture_output=True
    ).returncode:
        pytest.skip("this sandbox does not allow mounts")
    try:
        cache = ReplyCache(str(tmp_path), "a")

        def fill(cache: ReplyCache) -> None:
            for n in range(0, 10_000, 10):
                cache.put(wide(n))

        with pytest.raises(OSError, match="replies could not be stored: No space left on device") as failure:
            fill(cache)
        written = len(cache)
        assert failure.value.errno == errno.ENOSPC
        assert written >= 30
        assert (tmp_path / "a.jsonl").read_bytes().endswith(b"}\n"), "no part of the batch is left"
        assert cache.get(key(written)) is None
        subprocess.run(["mount", "-o", "remount,size=10m", str(tmp_path)], check=True)
        cache.put(wide(written))
        again = ReplyCache(str(tmp_path), "a")
        assert again.damaged == 0
        assert all(again.get(name) == reply for n in range(0, written + 10, 10) for name, reply in wide(n))
        del cache, again
    finally:
        gc.collect()
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)  # an error that is still held holds the cache open
