"""Ranked replies of other makers as preference pairs.

One JSON object a line (or a JSON array, or Parquet): a prompt and K >= 2 replies, each with a score (higher is better) or a
rank (1 is best; equal ranks are ties):

    {"id": "r1", "prompt": "...", "responses": [{"content": "...", "score": 4.5}, {"content": "...", "score": 2}]}
    {"messages": [{"role": "user", "content": "..."}], "responses": [{"content": "...", "rank": 1}, ...]}

`fields` renames them, for example `{responses: completions, content: response, score: overall_score}`. K replies give up
to K (K - 1) / 2 pairs (Ouyang et al. 2022, "InstructGPT", section 3.5). The margin of a pair is the difference of its scores,
or of its ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from operators import tables
from operators.config import Settings
from operators.synthesis import heuristics
from operators.synthesis.formats.fields import RowError, items, only, text
from operators.synthesis.formats.messages import messages_of
from operators.synthesis.preferences import PairingSettings, choose, pair_row
from operators.synthesis.requests import Reject
from operators.synthesis.rows import Account
from operators.synthesis.scoring import OpenPrompt, Scored, Scores, open_prompt

_MOST = 1000  # replies of one prompt; more would be a million pairs


class FieldSettings(Settings):
    """What the fields of a ranking are called."""

    prompt: str = Field(default="prompt", description="the question as text; `messages` may stand in its place")
    responses: str = Field(default="responses", description="the list of replies")
    content: str = Field(default="content", description="a reply's text")
    score: str = Field(default="score", description="a reply's score, higher is better")
    rank: str = Field(default="rank", description="a reply's rank, 1 is best; equal ranks are ties")


class RankingSettings(PairingSettings):
    """How rankings become pairs."""

    fields: FieldSettings = Field(default=FieldSettings(), description="other names of the fields")
    leave_out: list[str] = Field(default=[], description="fields to leave out; any other field that has no place rejects its row")


def read_ranking(row: Mapping[str, Any], identity: str, settings: RankingSettings) -> tuple[OpenPrompt, Scores]:
    """The prompt and its scored replies. A rank r counts as the score -r. Raises RowError."""
    names = settings.fields
    only(row, ["id", "messages", names.prompt, names.responses, *settings.leave_out])
    if (row.get("messages") is None) == (row.get(names.prompt) is None):
        raise RowError("malformed", f"give either {names.prompt!r} or 'messages'")
    whole = row.get("messages") is not None
    messages = messages_of(row["messages"], "messages") if whole else [{"role": "user", "content": text(row, names.prompt)}]
    prompt = open_prompt({"id": identity, "messages": messages, "lang": None})
    if isinstance(prompt, Reject):
        raise RowError(prompt.reason, "the ranking has no user's message to reply to")
    if prompt.reference is not None:
        raise RowError("malformed", "'messages' must end with the user: the replies stand in the list of replies")
    replies = items(row.get(names.responses), names.responses)
    if not 2 <= len(replies) <= _MOST:
        raise RowError("too_few" if len(replies) < 2 else "too_many", f"{len(replies)} replies; 2 to {_MOST} are ranked")
    kinds = {name for reply in replies for name in (names.score, names.rank) if reply.get(name) is not None}
    if len(kinds) != 1:
        raise RowError("unranked", f"every reply needs {names.score!r}, or every reply {names.rank!r}; found {sorted(kinds)}")
    kind = kinds.pop()
    samples = []
    for number, reply in enumerate(replies):
        only(reply, [names.content, names.score, names.rank, *settings.leave_out])
        value = reply.get(kind)
        number_given = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e9
        if value is None or not number_given or not math.isfinite(value):
            raise RowError("unranked", f"reply {number} has no number as {kind!r}")
        said = text(reply, names.content)
        score = round(float(value), 4) if kind == names.score else -float(value)
        tokens = max(1, heuristics.length_of(said, prompt.template_lang))
        form = 0.0 if heuristics.without_content(said) else 1.0
        samples.append(Scored(said, score, form, tokens, number, score))
    return prompt, Scores(samples)


def pairs_of(row: Mapping[str, Any], identity: str, source: str, author: str, settings: RankingSettings) -> Account:
    """The pairs of one ranking, or its reject."""
    account = Account("rankings")
    try:
        prompt, scores = read_ranking(row, identity, settings)
    except RowError as error:
        account.reject(identity, str(row)[:100_000], Reject(error.reason, detail=str(error)), source=source, created=False)
        return account
    found = choose(scores, settings, settings.min_margin or 1e-9)
    if isinstance(found, Reject):
        account.reject(identity, str(row)[:100_000], found, source=source, created=False)
        return account
    provenance = {"generator": author, "parents": [identity], "operation": "ranking"}
    for place, (best, worst, margin) in enumerate(found):
        pair_id = tables.stable_id("rankings", identity, best.number, worst.number)
        account.keep(pair_row(pair_id, prompt, best, worst, margin, provenance), "ranking", created=place > 0)
    return account
