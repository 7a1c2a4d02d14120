"""Replies of unusual size through the generator and its cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from operators.synthesis.requests import Reply, Request, SamplingSettings
from tests.operators.synthesis.recorded import Recording, generator


@pytest.mark.parametrize("word", ["river ", "河流，", "🙂\x00\n"])
def test_a_reply_of_a_hundred_thousand_tokens_passes_and_is_found_again(tmp_path: Path, word: str) -> None:
    long = Reply(word * 100_000, "length", 12, 100_000)
    recording = Recording(lambda request: long if request.seed else "short")
    requests = [Request((("user", "Go on."),), SamplingSettings(max_tokens=200_000), seed) for seed in (0, 1, 2)]
    drawing = generator(recording, str(tmp_path))
    replies = drawing.ask(requests)
    assert replies[1:] == [long, long]
    assert drawing.usage.completion_tokens > 200_000
    assert drawing.usage.truncated == 2
    again = generator(Recording(lambda request: pytest.fail("it is cached")), str(tmp_path))
    assert again.ask(requests) == replies
