"""Ranked replies become pairs: scores and ranks, ties, renamed fields, bad rows; English and Chinese."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from operators.synthesis.rankings import RankingSettings, pairs_of
from operators.synthesis.rows import Account
from pipelines.stages.rankings import RankingsStage
from tests.operators.synthesis.bench import Bench

EN = {
    "id": "en",
    "prompt": "Name a river.",
    "responses": [{"content": t, "score": s} for t, s in [("Nile.", 3), ("Rhine.", 5), ("No.", 3)]],
}
ZH = {
    "messages": [{"role": "user", "content": "说出一条河。"}],
    "responses": [{"content": t, "rank": r} for t, r in [("长江。", 1), ("黄河。", 2), ("不知道。", 4)]],
}


def made(row: dict[str, Any], **values: Any) -> Account:
    account = pairs_of(row, str(row.get("id", "x")), "f", "human", RankingSettings.model_validate({"pairs": "all", **values}))
    account.ledger.check("test")
    return account


def pairs(account: Account) -> list[tuple[str, str, float]]:
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"], row["margin"]) for row in account.rows]


def test_scores_and_ranks_give_all_pairs_that_are_no_ties() -> None:
    assert pairs(made(EN)) == [("Rhine.", "Nile.", 2.0), ("Rhine.", "No.", 2.0)]
    assert pairs(made(ZH)) == [("长江。", "不知道。", 3.0), ("黄河。", "不知道。", 2.0), ("长江。", "黄河。", 1.0)]
    assert pairs(made(ZH, min_margin=2)) == [("长江。", "不知道。", 3.0), ("黄河。", "不知道。", 2.0)]
    assert pairs(made(ZH, pairs="best_worst")) == [("长江。", "不知道。", 3.0)]
    row = made(ZH).rows[0]
    assert row["lang"] == "zh" and row["prompt"] == ZH["messages"] and row["tokens_chosen"] == 2 and row["score_chosen"] == -1.0
    assert made(ZH).ledger.created == 2 and made(ZH).ledger.rows_in == 1


def test_fields_may_have_other_names() -> None:
    row = {
        "instruction": "Name a river.", "source": "x",
        "completions": [{"response": "Nile.", "overall_score": 7.5, "model": "m"}, {"response": "No.", "overall_score": 2}],
    }  # fmt: skip
    names = {"prompt": "instruction", "responses": "completions", "content": "response", "score": "overall_score"}
    assert pairs(made(row, fields=names, leave_out=["source", "model"])) == [("Nile.", "No.", 5.5)]
    assert [r["reason"] for r in made(row, fields=names).rejects] == ["unknown_field"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"responses": EN["responses"][:1]}, "too_few"),
        ({"responses": "x"}, "malformed"),
        ({"responses": [{"content": "a", "score": 1}, {"content": "b"}]}, "unranked"),
        ({"responses": [{"content": "a", "score": 1}, {"content": "b", "rank": 1}]}, "unranked"),
        ({"responses": [{"content": "a", "score": 1}, {"content": "b", "score": True}]}, "unranked"),
        ({"responses": [{"content": "a", "score": 1}, {"content": "b", "score": 1e400}]}, "unranked"),
        ({"responses": [{"content": "a", "score": 1}, {"content": None, "score": 2}]}, "malformed"),
        ({"responses": [{"content": "same", "score": 1}, {"content": "same", "score": 2}]}, "tie"),
        ({"responses": [{"content": "a", "score": 1}, {"content": "b", "score": 1}]}, "tie"),
        ({"prompt": None}, "malformed"),
        ({"prompt": " "}, "no_prompt"),
        ({"messages": [{"role": "user", "content": "x"}]}, "malformed"),
        ({"extra": 1}, "unknown_field"),
    ],
)
def test_a_row_that_is_no_ranking_is_rejected_with_its_reason(change: dict[str, Any], reason: str) -> None:
    account = made({**EN, **change})
    assert not account.rows and [r["reason"] for r in account.rejects] == [reason]


def test_the_stage_reads_files_and_measures_length_bias(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    path = tmp_path / "ranked.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in (EN, ZH, {**EN, "id": "bad", "responses": []})]
    path.write_text("\n".join([*lines, "{broken"]) + "\n", "utf-8")
    found = bench.stage(RankingsStage, "rankings", {"path": str(path)}, None)
    assert found.rows == 5 and found.stats["pairs"] == 5
    assert found.ledger.to_json() == {
        "in": 4, "created": 3, "kept": 5, "quarantined": 1, "rejected": {"rankings:too_few": 1}}  # fmt: skip
    assert found.stats["length_bias"]["all"]["pairs"] == 5
    assert len({row["id"] for row in bench.rows("rankings")}) == 5
    bound = bench.stage(RankingsStage, "rankings-2", {"path": str(path), "max_chosen_shorter": 0.0}, None)
    assert bound.rows == 5 - bound.ledger.rejected["rankings:chosen_shorter"] < 5
