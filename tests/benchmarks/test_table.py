"""The table of results tells reached from missed, and what was never measured."""

from __future__ import annotations

from benchmarks import table


def test_a_ratio_stands_beside_its_goal() -> None:
    results = {"corpus.minhash": {"ratio": {"vs_datatrove": 250.0, "vs_rensa": 5.0, "vs_other": 2.0}}}
    found = {(name, key): (measured, goal, verdict) for name, key, measured, goal, verdict in table.rows(results)}
    assert found["corpus.minhash", "vs_datatrove"] == ("250", "200", "reached")
    assert found["corpus.minhash", "vs_rensa"] == ("5", "6", "MISSED")
    assert found["corpus.minhash", "vs_other"] == ("2", "-", "")
    assert found["corpus.minhash", "vs_datasketch"] == ("-", "30", "not measured")


def test_a_result_without_ratios_is_listed() -> None:
    assert ("corpus.growth", "(no ratio)", "-", "-", "see the file") in list(table.rows({"corpus.growth": {"ratio": {}}}))
