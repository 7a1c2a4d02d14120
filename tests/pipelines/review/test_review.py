"""Samples, verdicts and what they say: from `danlu review export` to the stage that waits for people."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import shards
from operators.config import SettingsError, parse
from operators.stage import StageContext
from pipelines.cli import main
from pipelines.review import findings, page, sample, verdicts
from pipelines.review.agreement import agreements, estimate, total, wilson
from pipelines.review.findings import Requirement
from pipelines.stages.reviewed import ReviewedStage
from tests.pipelines.report.page import parse as parse_html
from tests.pipelines.review.run import DOCUMENTED, HOSTILE, conversation, make_run, write_stage


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def review(run: Path, stage: str, out: Path, rows: int = 40) -> list[dict[str, Any]]:
    """The lines of an exported sample."""
    assert main(["review", "export", str(run), stage, "--rows", str(rows), "--out", str(out)]) == 0
    return lines(out / "review.jsonl")


def judged(path: Path, rows: list[dict[str, Any]], said: Any, reviewer: str = "Li Lei") -> Path:
    """A file of verdicts; `said(row)` is each row's."""
    path.write_text("".join(json.dumps({**row, "verdict": said(row), "reviewer": reviewer}) + "\n" for row in rows), "utf-8")
    return path


# --- samples


def test_a_sample_is_stratified_and_the_same_again_whatever_the_parts(tmp_path: Path, run: Path) -> None:
    drawn = sample.draw(str(run / "chat" / "f00d"), 60)
    assert {stratum.values: (stratum.rows, stratum.drawn) for stratum in drawn.strata} == {
        ("teacher-7b", "documents:dialogue"): (40, 9),
        ("teacher-7b", "documents:pairs"): (360, 51),
    }
    assert all(stratum.drawn >= 5 for stratum in drawn.strata)
    other = write_stage(tmp_path / "other", "chat", [conversation(number) for number in range(400)], DOCUMENTED, 33)
    assert sample.draw(other, 60).items == drawn.items
    assert sample.Sample.from_json(drawn.to_json()) == drawn
    assert sample.draw(other, 60, seed=1).items != drawn.items
    assert [stratum.values for stratum in sample.draw(other, 60, lines=("lang",)).strata] == [("en",), ("zh",)]
    assert len(sample.draw(other, 1000).items) == 400


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=30).filter(any), st.integers(1, 500))
def test_an_allocation_gives_out_what_is_wanted_and_no_stratum_more_than_it_has(sizes: list[int], wanted: int) -> None:
    found = sample.allocate(sizes, wanted)
    assert sum(found) == min(wanted, sum(sizes))
    assert all(0 <= count <= size for count, size in zip(found, sizes, strict=True))
    least = min(5, wanted // len(sizes))
    assert all(count >= min(size, least) for count, size in zip(found, sizes, strict=True))


def test_every_row_of_a_stratum_is_as_likely_as_another(tmp_path: Path) -> None:
    directory = write_stage(tmp_path / "run", "chat", [conversation(number) for number in range(100)], DOCUMENTED)
    seen = Counter(item.row for seed in range(200) for item in sample.draw(directory, 20, seed, ("lang",)).items)
    assert len(seen) == 100
    spread = np.array([seen[row] for row in range(100)])
    assert abs(spread - 40).max() < 5.5 * math.sqrt(40)


def test_a_stage_without_rows_for_people_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    directory = write_stage(
        tmp_path / "run", "keys", [{"id": "a", "key": 1}], pa.schema([("id", pa.string()), ("key", pa.int64())])
    )
    with pytest.raises(SettingsError, match="stage keys has no rows that people could judge"):
        sample.draw(directory, 5)


# --- the page


def test_the_page_and_its_lines_hold_the_rows_with_their_source_and_do_not_tell_the_method(tmp_path: Path, run: Path) -> None:
    rows = review(run, "chat", tmp_path / "out", 60)
    assert len(rows) == 60
    first = rows[0]
    assert set(first) == {"sample", "item", "id", "lang", "messages", "span", "key_points", "verdict", "note", "reviewer"}
    assert set(first["span"]) == {"source_id", "span_start", "span_end", "span_text"}
    text = (tmp_path / "out" / "review.html").read_text("utf-8")
    data = json.loads(parse_html(text).by_id("data").text())
    assert [item["id"] for item in data["items"]] == [row["id"] for row in rows]
    for told in ("teacher-7b", "documents:dialogue", "documents:pairs"):
        assert told not in text
        assert told not in (tmp_path / "out" / "review.jsonl").read_text("utf-8")


def test_hostile_text_is_data_and_nothing_else(tmp_path: Path, run: Path) -> None:
    directory = str(run / "chat" / "f00d")
    drawn = sample.draw(directory, 400)
    page.write(directory, drawn, str(tmp_path / "out"))
    text = (tmp_path / "out" / "review.html").read_text("utf-8")
    tree = parse_html(text)
    assert len(tree.all("script")) == 2
    assert not tree.all("img")
    assert "\u202e" not in text
    data = tree.by_id("data").text()
    assert not set("<>&\u2028\u2029") & set(data)
    (item,) = [item for item in json.loads(data)["items"] if item["id"] == "row-0004"]
    assert item["messages"][0]["text"].startswith("</script><script>document.title")
    assert "⟨U+202E⟩⟨NUL⟩⟨U+2028⟩" in item["messages"][0]["text"]
    (row,) = [row for row in lines_with_separators(tmp_path / "out" / "review.jsonl") if row["id"] == "row-0004"]
    assert row["messages"][0]["content"] == HOSTILE  # as it is
    policy = tree.all("meta")[1].attributes["content"]
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not [e for e in tree.all() if e.attributes.get("src") or e.attributes.get("href", "#").startswith(("http", "//"))]


def lines_with_separators(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n") if line]


def test_pairs_stand_in_random_order_that_the_files_do_not_tell(tmp_path: Path, run: Path) -> None:
    rows = review(run, "pairs", tmp_path / "out", 100)
    drawn = sample.kept(str(run / "pairs" / "f00d"))[0]
    swapped = [item.swapped for item in drawn.items]
    assert 30 < sum(swapped) < 70
    for row, item in zip(rows, drawn.items, strict=True):
        worse = row["left" if item.swapped else "right"][0]["content"]
        assert worse.startswith(("It depends.", "看情况。"))
        assert set(row) == {"sample", "item", "id", "lang", "prompt", "left", "right", "verdict", "note", "reviewer"}
    assert "swapped" not in (tmp_path / "out" / "review.html").read_text("utf-8")


def test_long_texts_are_clipped_on_the_page_and_whole_in_the_lines(tmp_path: Path) -> None:
    row = conversation(1)
    row["messages"][1]["content"] = "长" * 30_000
    directory = write_stage(tmp_path / "run", "chat", [row], DOCUMENTED)
    page.write(directory, sample.draw(directory, 1), str(tmp_path / "out"))
    (item,) = json.loads(parse_html((tmp_path / "out" / "review.html").read_text("utf-8")).by_id("data").text())["items"]
    assert (len(item["messages"][1]["text"]), item["messages"][1]["more"]) == (20_000, 10_000)
    assert len(lines(tmp_path / "out" / "review.jsonl")[0]["messages"][1]["content"]) == 30_000


# --- verdicts


def test_verdicts_are_imported_once_and_the_report_tells_acceptance(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = review(run, "chat", tmp_path / "out", 60)
    file = judged(tmp_path / "v.jsonl", rows, lambda row: "reject" if row["item"] % 4 == 0 else "accept")
    assert main(["review", "import", str(run), "chat", str(file)]) == 0
    assert "60 verdicts imported, 0 replaced, 0 known already, 0 rows not judged; reviewers: Li Lei" in capsys.readouterr().out
    assert main(["review", "import", str(run), "chat", str(file)]) == 0
    assert "0 verdicts imported, 0 replaced, 60 known already" in capsys.readouterr().out
    found = findings.findings(str(run / "chat" / "f00d"))
    assert found.total.judged == 60
    assert found.verdicts == {"accept": 45, "reject": 15}
    assert found.total.low < 0.75 < found.total.high
    assert main(["review", "report", str(run)]) == 0
    told = capsys.readouterr().out
    assert "documents:dialogue" in told
    assert "reviewers: Li Lei (60)" in told
    assert main(["review", "report", str(run), "chat", "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)["chat"]
    assert parsed["total"]["point"] == found.total.point
    assert {entry["method"] for entry in parsed["strata"]} == {"documents:dialogue", "documents:pairs"}


def test_a_filled_in_file_without_a_reviewer_needs_one_and_open_rows_are_left(tmp_path: Path, run: Path) -> None:
    rows = review(run, "chat", tmp_path / "out", 10)
    filled = [{**row, "verdict": "accept" if row["item"] < 4 else None} for row in rows]
    file = tmp_path / "filled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in filled), "utf-8")
    directory = str(run / "chat" / "f00d")
    with pytest.raises(SettingsError, match=r"line 1: no reviewer: name one in the line \(`reviewer`\) or with --reviewer"):
        verdicts.import_files(directory, [str(file)])
    done = verdicts.import_files(directory, [str(file)], "韩梅梅")
    assert (done.added, done.open, done.reviewers) == (4, 6, {"韩梅梅"})


def test_wrong_lines_are_all_named_and_nothing_is_imported(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = review(run, "chat", tmp_path / "out", 20)
    other = review(run, "pairs", tmp_path / "other", 20)
    good = {**rows[0], "verdict": "accept", "reviewer": "A"}
    wrong: list[tuple[Any, str]] = [
        ("{broken", "line 2"),
        ({**rows[1], "verdict": "accept", "reviewer": "A", "item": 99}, "item 99 is none of the sample's 20"),
        ({**rows[1], "verdict": "accept", "reviewer": "A", "item": True}, "item True is none of"),
        ({**rows[1], "verdict": "accept", "reviewer": "A", "item": 2}, f"item 2 is row {rows[2]['id']!r}"),
        ({**rows[1], "verdict": "aceept", "reviewer": "A"}, "unknown verdict 'aceept'; did you mean 'accept'?"),
        ({**rows[1], "verdict": "left", "reviewer": "A"}, "unknown verdict 'left'"),
        ({**other[1], "verdict": "left", "reviewer": "A"}, "is none of stage chat as it is now"),
        ({**rows[1], "verdict": "accept", "reviewer": "A", "sample": None}, "no `sample`"),
        (good, "A judges item 0 twice (also"),
    ]
    file = tmp_path / "wrong.jsonl"
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in [good, *(row for row, _ in wrong)]), "utf-8"
    )
    capsys.readouterr()
    assert main(["review", "import", str(run), "chat", str(file)]) == 2
    told = capsys.readouterr().err
    for _, message in wrong:
        assert message in told
    assert "nothing was imported" in told
    assert verdicts.imported(str(run / "chat" / "f00d")) == []


def test_a_verdict_changes_only_when_that_is_asked_for(tmp_path: Path, run: Path) -> None:
    rows, directory = review(run, "chat", tmp_path / "out", 10), str(run / "chat" / "f00d")
    verdicts.import_files(directory, [str(judged(tmp_path / "a.jsonl", rows, lambda row: "accept"))])
    changed = str(judged(tmp_path / "b.jsonl", rows[:3], lambda row: "reject"))
    with pytest.raises(SettingsError, match=r"judged it 'accept' before, now 'reject'; import with --replace"):
        verdicts.import_files(directory, [changed])
    done = verdicts.import_files(directory, [changed], replace=True)
    assert (done.added, done.replaced) == (0, 3)
    assert findings.findings(directory).verdicts == {"accept": 7, "reject": 3}


def test_a_sample_is_known_again_on_another_machine(tmp_path: Path, run: Path) -> None:
    rows, directory = review(run, "pairs", tmp_path / "out", 30), str(run / "pairs" / "f00d")
    file = judged(tmp_path / "v.jsonl", rows, lambda row: "left")
    for path in (run / ".review").rglob("*.json"):
        path.unlink()
    found, _, problems = verdicts.read(directory, [str(file)], None)
    assert not problems
    assert findings.findings(directory, found).total.judged == 30


def test_of_pairs_the_better_side_is_compared_with_the_chosen_one(tmp_path: Path, run: Path) -> None:
    rows, directory = review(run, "pairs", tmp_path / "out", 50), str(run / "pairs" / "f00d")

    def fair(row: dict[str, Any]) -> str:
        if row["item"] < 5:
            return ("tie", "neither", "skip", "tie", "skip")[row["item"]]
        return "left" if row["right"][0]["content"].startswith(("It depends.", "看情况。")) else "right"

    verdicts.import_files(directory, [str(judged(tmp_path / "v.jsonl", rows, fair))])
    found = findings.findings(directory)
    assert found.verdicts == {"chosen": 45, "neither": 1, "skip": 2, "tie": 2}
    assert found.total.judged == 48
    assert found.total.point == pytest.approx(45 / 48)


# --- numbers


def test_wilsons_interval_is_that_of_the_textbook() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Brown, Cai and DasGupta 2001
    assert wilson(0, 20)[0] == 0.0
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(50, 100, 0.9) == pytest.approx((0.4188, 0.5812), abs=1e-4)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 60), st.floats(0.5, 0.999))
def test_wilsons_bounds_solve_their_equation(successes: int, trials: int, confidence: float) -> None:
    from statistics import NormalDist

    successes = min(successes, trials)
    share, z = successes / trials, NormalDist().inv_cdf(0.5 + confidence / 2)
    for bound in wilson(successes, trials, confidence):
        if 0 < bound < 1:
            assert abs(share - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / trials), abs=1e-4)


def test_the_total_weighs_strata_by_their_rows() -> None:
    small, large = estimate(10, [0.0] * 10), estimate(990, [1.0] * 10)
    found = total([small, large, estimate(500, [])])
    assert found.point == pytest.approx(0.99)
    assert (found.rows, found.judged) == (1500, 20)
    even = total([estimate(100, [1.0, 0.0] * 10), estimate(100, [1.0, 0.0] * 10)])
    assert (even.low, even.high) == wilson(20, 40)  # equal strata: as one sample
    assert total([]).point is None


def test_kappa_is_that_of_cohens_example() -> None:
    first = {row: "a" for row in range(25)} | {row: "b" for row in range(25, 50)}
    second = {row: "a" for row in range(20)} | {row: "b" for row in range(20, 25)} | {row: "a" for row in range(25, 35)}
    second |= {row: "b" for row in range(35, 50)}
    (found,) = agreements({"x": first, "y": second, "alone": {99: "a"}})
    assert (found.rows, found.agreed, found.kappa) == (50, 0.7, 0.4)
    (same,) = agreements({"x": {1: "a", 2: "a"}, "y": {1: "a", 2: "a"}})
    assert (same.agreed, same.kappa) == (1.0, None)


def test_rows_that_several_judged_count_once_and_their_agreement_is_told(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, directory = review(run, "chat", tmp_path / "out", 20), str(run / "chat" / "f00d")
    verdicts.import_files(directory, [str(judged(tmp_path / "a.jsonl", rows, lambda row: "accept", "A"))])
    half = judged(tmp_path / "b.jsonl", rows[:10], lambda row: "reject" if row["item"] < 3 else "accept", "B")
    verdicts.import_files(directory, [str(half)])
    found = findings.findings(directory)
    assert found.total.judged == 20
    assert found.reviewers == {"A": 20, "B": 10}
    assert found.agreement[0].agreed == 0.7
    assert found.rejected == ()  # one of two votes is no majority
    main(["review", "report", str(run), "chat"])
    assert "agreement: A and B on 10 rows: 70.0%, kappa 0.00" in capsys.readouterr().out


# --- the stage that waits


def reviewed(run: Path, limit: int | None = None, **values: Any) -> shards.Manifest:
    stage = parse(ReviewedStage, {"kind": "reviewed", "input": "chat", **values}, "stages.gate")
    directory = str(run / "gate" / "f1")
    stage.run(
        StageContext(
            "gate", "reviewed", directory, "f1", stage.model_dump(mode="json"), {"chat": str(run / "chat" / "f00d")}, 17, limit,
            base_directory=str(run.parent),
        )
    )  # fmt: skip
    return shards.load_manifest(directory)


def test_a_stage_waits_for_the_review_and_says_how_to_make_it(tmp_path: Path, run: Path) -> None:
    with pytest.raises(SettingsError) as told:
        reviewed(run, min_acceptance=0.8)
    for piece in (
        "0 rows are judged, 30 are needed",
        "unknown (none of",
        f"danlu review export {run} chat --rows 100 --out review",
    ):
        assert piece in str(told.value)
    rows = review(run, "chat", tmp_path / "out", 100)
    file = judged(tmp_path / "v.jsonl", rows, lambda row: "reject" if row["item"] % 8 == 0 else "accept")
    verdicts.import_files(str(run / "chat" / "f00d"), [str(file)])
    with pytest.raises(SettingsError, match=r"its lower bound \(95% interval\) must be at least 85\.0%"):
        reviewed(run, min_acceptance=0.85)
    manifest = reviewed(run, min_acceptance=0.85, bound="point")
    assert manifest.rows == 400
    assert manifest.stats["review"]["total"]["judged"] == 100
    assert shards.parts([str(run / "gate" / "f1")])[0].path == shards.parts([str(run / "chat" / "f00d")])[0].path


def test_every_stratum_can_be_asked_of(tmp_path: Path, run: Path) -> None:
    rows, directory = review(run, "chat", tmp_path / "out", 100), str(run / "chat" / "f00d")
    drawn = sample.kept(directory)[0]
    bad = [stratum.values[1] for stratum in drawn.strata].index("documents:dialogue")
    said = lambda row: "reject" if drawn.items[row["item"]].stratum == bad else "accept"  # noqa: E731
    verdicts.import_files(directory, [str(judged(tmp_path / "v.jsonl", rows, said))])
    assert not Requirement(min_acceptance=0.8).unmet(findings.findings(directory))
    (unmet,) = Requirement(min_acceptance=0.8, per="stratum").unmet(findings.findings(directory))
    assert "acceptance for teacher-7b|documents:dialogue is 0.0%" in unmet


def test_a_trial_run_asks_nobody(run: Path) -> None:
    manifest = reviewed(run, limit=10, min_acceptance=1.0)
    assert manifest.rows == 400
    assert manifest.stats["asked"] is False


def test_rejected_rows_can_be_left_out_by_files_that_the_recipe_names(tmp_path: Path, run: Path) -> None:
    with pytest.raises(SettingsError, match="`drop_rejected` needs `verdicts`"):
        reviewed(run, min_acceptance=0.5, drop_rejected=True)
    stage = parse(ReviewedStage, {"kind": "reviewed", "input": "chat", "min_acceptance": 0.5, "verdicts": "v*.jsonl"}, "gate")
    assert stage.files_at(str(tmp_path)) == []  # before there are any, the recipe can be planned
    rows = review(run, "chat", tmp_path / "out", 100)
    judged(tmp_path / "v1.jsonl", rows, lambda row: "reject" if row["item"] % 8 == 0 else "accept")
    assert stage.files_at(str(tmp_path)) == ["v*.jsonl"]
    manifest = reviewed(run, min_acceptance=0.5, verdicts="v*.jsonl", drop_rejected=True)
    gone = {row["id"] for row in rows if row["item"] % 8 == 0}
    assert manifest.ledger.to_json() == {
        "in": 400, "created": 0, "kept": 387, "rejected": {"reviewed:rejected_by_people": 13}, "quarantined": 0,
    }  # fmt: skip
    left = {
        row
        for part in shards.parts([str(run / "gate" / "f1")])
        for _, batch in shards.read(part, ["id"])
        for row in batch["id"].to_pylist()
    }
    assert len(left) == 387
    assert not left & gone
    listed = {row["id"] for name in manifest.files["removed"] for row in pq.read_table(run / "gate" / "f1" / name).to_pylist()}
    assert listed == gone


def test_the_report_tells_whether_a_stage_that_waits_is_content(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, directory = review(run, "chat", tmp_path / "out", 60), str(run / "chat" / "f00d")
    verdicts.import_files(directory, [str(judged(tmp_path / "v.jsonl", rows, lambda row: "accept"))])
    reviewed(run, min_acceptance=0.9)
    record = json.loads((run / "run.json").read_text("utf-8"))
    record["stages"]["gate"] = {"kind": "reviewed", "directory": "gate/f1", "inputs": ["chat"], "status": "done", "seconds": 1}
    (run / "run.json").write_text(json.dumps(record), "utf-8")
    main(["review", "report", str(run), "chat"])
    assert "required by gate: met" in capsys.readouterr().out
    changed = judged(tmp_path / "w.jsonl", rows[:30], lambda row: "reject")
    verdicts.import_files(directory, [str(changed)], replace=True)
    main(["review", "report", str(run), "chat"])
    assert "required by gate: NOT met: acceptance in total is" in capsys.readouterr().out


def test_usage_errors_say_what_is_wrong(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["export", str(run), "chta", "--out", "x"], "did you mean 'chat'?"),
        (["export", str(tmp_path), "chat", "--out", "x"], "is no run"),
        (["report", str(run)], "nothing of"),
    ):
        assert main(["review", *arguments]) == 2
        assert told in capsys.readouterr().err
