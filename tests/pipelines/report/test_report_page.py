"""The page says what the manifests say, needs nothing else, and lets no text act."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from operators import shards
from pipelines import diagnose
from pipelines.report.build import build_report
from pipelines.report.figures import number
from tests.pipelines.report.fixture_run import ORDER, SCRIPT, build_run, read_record, write_record
from tests.pipelines.report.page import Element, parse


@pytest.fixture(scope="module")
def html(finished_run: Path) -> str:
    return Path(build_report(str(finished_run))).read_text("utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Element:
    return parse(html)


def _manifest(run: Path, stage: str) -> shards.Manifest:
    return shards.load_manifest(str(next((run / stage).iterdir())))


def _built(run: Path) -> tuple[str, Element]:
    html = Path(build_report(str(run))).read_text("utf-8")
    return html, parse(html)


def test_every_ledger_row_shows_the_numbers_of_its_manifest(finished_run: Path, page: Element) -> None:
    for stage, *_ in ORDER:
        ledger = _manifest(finished_run, stage).ledger
        cells = [cell.text() for cell in page.by_id(f"stage-{stage}").all("td")]
        wanted = [ledger.rows_in, ledger.created, ledger.kept, sum(ledger.rejected.values()), ledger.quarantined]
        assert cells[:5] == [f"{value:,}" for value in wanted]
        assert "balances" in cells[5]


def test_the_funnel_shows_what_each_operator_removed_and_why(finished_run: Path, page: Element) -> None:
    funnel = _manifest(finished_run, "web").stats["funnel"]
    table = next(table for table in page.by_id("corpus").all("table") if "gopher_repetition" in table.text())
    rows = {row.all("th")[0].text(): [cell.text() for cell in row.all("td")] for row in table.all("tr") if row.all("td")}
    for key, entry in funnel.items():
        shown = rows[key.split(":", 1)[1]]
        removed = sum(entry["rejected"].values())
        assert (shown[1], shown[3]) == (number(entry["kept"]), number(removed))
        for reason in sorted(entry["rejected"], key=lambda name: (-entry["rejected"][name], name))[:4]:
            assert f"{reason} {entry['rejected'][reason]}" in shown[5]


def test_every_reason_of_every_ledger_is_listed_with_its_count(finished_run: Path, page: Element) -> None:
    for stage, section in (("web", "corpus"), ("docs", "corpus"), ("tasks", "synthesis"), ("pairs", "preferences")):
        text = page.by_id(section).text()
        for key, count in _manifest(finished_run, stage).ledger.rejected.items():
            operator, reason = key.split(":")
            assert re.search(rf"{operator}\s+{reason}\s*{count:,}\s", text), (stage, key)


def test_the_figures_at_the_top_are_sums_of_manifests(finished_run: Path, page: Element) -> None:
    shown = {item.all("dt")[0].text(): item.all("dd")[0].text() for item in page.all("dl", "figures")[0].children}
    web, docs, clean = (_manifest(finished_run, stage) for stage in ("web", "docs", "clean"))
    assert shown["documents read"] == f"{web.ledger.rows_in + docs.ledger.rows_in:,}"
    assert shown["kept by the corpus operators"] == f"{web.rows + docs.rows:,}"
    assert shown["duplicates removed"] == f"{web.rows + docs.rows - clean.rows:,}"
    assert shown["tokens packed"] == f"{_manifest(finished_run, 'tokens').stats['tokens']:,}"
    assert shown["instructions synthesised"] == f"{_manifest(finished_run, 'evolved').rows:,}"  # not tasks + evolved


def test_evaluation_shows_every_perplexity_and_the_change_against_the_first_model(finished_run: Path, page: Element) -> None:
    text = page.by_id("evaluation").all("table")[0].text()
    for entry in _manifest(finished_run, "scores").stats["perplexity"]:
        assert number(entry["perplexity"]) in text
    assert "+55.0%" in text
    assert "−6.0%" in text


def test_other_equations_are_written_out_term_by_term(page: Element) -> None:
    text = page.by_id("ledger").text()
    assert "1,214,757 packed" in text
    assert "512 cut" in text


def test_the_cost_of_model_calls_stands_beside_their_tokens(page: Element) -> None:
    rows = [{cell.text() for cell in row.all("td")} for row in page.all("tr")]
    assert any({"301", "181,022", "40,127", "289", "35.0%", "0.123 USD"} <= row for row in rows)


def test_training_tables_hold_the_last_point_of_every_curve(finished_run: Path, page: Element) -> None:
    text = page.by_id("training").text()
    for stage in ("base", "chat", "wide", "aligned"):
        manifest = _manifest(finished_run, stage)
        assert number(manifest.stats["curve"][-1]["loss"]) in text
    timings = json.loads(next((finished_run / "base").glob("*/timings.json")).read_text())
    assert number(timings["curve"][-1]["tokens_per_second"]) in text  # measured beside the result, shown with it


def test_examples_come_from_the_rejected_rows_themselves(page: Element) -> None:
    text = page.by_id("corpus").text()
    assert "A page about forms." in text
    assert "点击这里 免费领取 0 buy now!!!" in text
    assert "measured 0.002" in text
    assert "content length <script>" in text  # detail of a quarantined record


def test_text_of_the_corpus_never_becomes_markup(html: str, page: Element) -> None:
    assert SCRIPT not in html
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert html.count("<script") == 1
    for element in page.all():
        assert not [name for name in element.attributes if name.startswith("on") or name == "style"]


def test_the_page_names_no_address_outside_its_text(html: str, page: Element) -> None:
    for element in page.all():
        for name, value in element.attributes.items():
            if name.startswith("data-tip"):
                continue
            assert "://" not in value, (element.tag, name, value)
        if element.tag == "a":
            assert element.attributes["href"].startswith("#")
        assert element.tag not in {"link", "iframe", "object", "embed", "base", "form", "source"}
        if element.tag in {"style", "script"}:
            assert not re.search(r"https?:|url\(|@import|//[a-z]", element.text().replace("// ", "")), element.tag


def test_the_security_policy_knows_the_inline_style_and_script_by_hash_only(page: Element) -> None:
    import base64
    import hashlib

    policy = next(meta.attributes["content"] for meta in page.all("meta") if meta.attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.all(tag)[0].text().encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_control_and_direction_characters_are_spelled_out(html: str) -> None:
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)
    assert '<b class="ctl">NUL</b>' in html
    assert '<b class="ctl">U+202E</b>' in html


def test_long_texts_are_clipped_and_say_by_how_much(page: Element) -> None:
    assert max(len(block.text()) for block in page.all("div", "excerpt")) < 4000
    assert "more characters" in page.by_id("corpus").text()


def test_every_link_inside_the_page_leads_somewhere(page: Element) -> None:
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link.attributes["href"][1:] in ids
    for element in page.all():
        if "aria-labelledby" in element.attributes:
            assert element.attributes["aria-labelledby"] in ids


def test_the_page_reads_in_chinese_too(page: Element) -> None:
    text = page.by_id("main").text("zh")
    assert "运行完成，每一行都有去向。" in text
    assert "What each operator let through" not in text


def test_the_same_run_gives_the_same_bytes(finished_run: Path, html: str) -> None:
    assert Path(build_report(str(finished_run))).read_text("utf-8") == html


def test_a_failed_run_says_where_and_why(run_copy: Path) -> None:
    record = read_record(run_copy)
    for stage in ("chat", "wide", "aligned", "scores"):
        record["stages"][stage].update(status="pending", seconds=0.0)
    record["stages"]["chat"]["status"] = "failed"
    record["message"] = "stage chat: out of memory <b>\x1b[31m"
    write_record(run_copy, record)
    _, page = _built(run_copy)
    text = page.by_id("main").text()
    assert "Failed at chat." in text
    assert "stage chat: out of memory <b>" in text
    assert "Complete." not in text
    assert "scores: not started. There are no numbers to show." in page.by_id("evaluation").text()
    assert page.by_id("stage-chat").text().endswith("failed")
    assert "7,341,312" in page.by_id("training").text()  # base is done and is shown


def test_an_interrupted_run_counts_what_is_done(run_copy: Path) -> None:
    record = read_record(run_copy)
    for stage in list(record["stages"])[3:]:
        record["stages"][stage].update(status="pending", seconds=0.0, directory="")
    write_record(run_copy, record)
    _, page = _built(run_copy)
    assert "Not finished: 3 of 14 stages are done." in page.by_id("main").text()


def test_a_run_that_has_just_begun_has_a_report(run_copy: Path) -> None:
    record = read_record(run_copy)
    for stage in record["stages"].values():
        stage.update(status="pending", seconds=0.0, directory="", reused=False)
    record.update(seconds=0.0, machine={}, command="", recipe_text="")
    write_record(run_copy, record)
    _, page = _built(run_copy)
    assert "Not finished: 0 of 14" in page.by_id("main").text()
    assert "Not finished: 0 of 14" not in page.by_id("main").text("zh")


def test_a_finished_stage_whose_manifest_is_gone_is_named(run_copy: Path) -> None:
    next((run_copy / "bpe").iterdir()).joinpath("manifest.json").unlink()
    _, page = _built(run_copy)
    text = page.by_id("main").text()
    assert "the record of bpe cannot be read" in text
    assert "has no manifest.json" in text


def test_the_timeline_places_stages_where_they_began(run_copy: Path) -> None:
    record = read_record(run_copy)
    for index, stage in enumerate(record["order"]):
        record["stages"][stage]["started"] = 1772356364.12 + 40 * index  # the run began at 1772356364.12
    write_record(run_copy, record)
    _, page = _built(run_copy)
    bars = {
        row.all("th")[0].text(): row.all("rect")[1].attributes
        for row in page.by_id("resources").all("table")[0].all("tr")
        if len(row.all("rect")) > 1
    }
    total = max(612.4, *(40 * index + seconds for index, (_, _, _, seconds) in enumerate(ORDER)))
    assert float(bars["judge"]["x"][:-1]) == 0
    assert float(bars["web"]["x"][:-1]) == pytest.approx(100 * 40 / total, abs=0.01)
    assert "docs" not in bars  # reused
    assert "Each bar begins when its stage began." in page.by_id("resources").text()


def test_rejected_rows_that_are_gone_are_reported_and_still_counted(run_copy: Path) -> None:
    next(next((run_copy / "web").iterdir()).joinpath("rejects").iterdir()).unlink()
    next(next((run_copy / "tasks").iterdir()).joinpath("parts").iterdir()).write_bytes(b"PAR1 damaged")
    _, page = _built(run_copy)
    assert "Examples cannot be read" in page.by_id("corpus").text()
    assert "other_language 118" in page.by_id("corpus").text()
    assert "Examples cannot be read" in page.by_id("synthesis").text()


def test_an_account_that_does_not_balance_is_not_called_complete(run_copy: Path) -> None:
    path = next((run_copy / "web").iterdir()) / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["ledger"]["kept"] -= 1
    path.write_text(json.dumps(manifest), "utf-8")
    _, page = _built(run_copy)
    assert "The ledger does not balance at web." in page.by_id("main").text()
    assert "1,244 against 1,243" in page.by_id("stage-web").text()


def test_stages_without_statistics_still_make_a_page(run_copy: Path) -> None:
    for stage, *_ in ORDER:
        path = next((run_copy / stage).iterdir()) / "manifest.json"
        manifest = json.loads(path.read_text("utf-8"))
        manifest["stats"] = {}
        path.write_text(json.dumps(manifest), "utf-8")
    _, page = _built(run_copy)
    assert "Complete." in page.by_id("main").text()


def test_a_recipe_of_one_unknown_kind_gets_a_report_without_empty_sections(run_copy: Path) -> None:
    record = read_record(run_copy)
    record["order"] = ["clean"]
    record["stages"] = {"clean": {**record["stages"]["clean"], "kind": "compact<ion>", "inputs": []}}
    write_record(run_copy, record)
    _, page = _built(run_copy)
    assert [section.attributes["id"] for section in page.all("section")] == ["lineage", "ledger", "resources", "recipe"]
    assert "compact<ion>" in page.by_id("stage-clean").text()


def test_a_mixture_shows_each_group_with_what_was_taken_and_how_often(run_copy: Path) -> None:
    record = read_record(run_copy)
    record["order"] = ["clean"]
    record["stages"] = {"clean": {**record["stages"]["clean"], "kind": "mix", "inputs": []}}
    write_record(run_copy, record)
    path = next((run_copy / "clean").iterdir()) / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    groups = {
        "en<b>": {"documents": 90, "size": 900, "share": 0.75, "repeats": 0.6667, "taken": {"documents": 60, "size": 600}},
        "zh": {"documents": 10, "size": 100, "share": 0.25, "repeats": 2, "taken": {"documents": 20, "size": 200}},
    }
    manifest["kind"], manifest["stats"] = "mix", {"unit": "tokens", "total": 800, "groups": groups}
    path.write_text(json.dumps(manifest), "utf-8")
    _, page = _built(run_copy)
    rows = [[cell.text().strip() for cell in row.children if cell.text().strip()] for row in page.by_id("choosing").all("tr")]
    assert rows[1] == ["en<b>", "90", "60", "900", "600", "75.0%", "0.667"]
    assert rows[2] == ["zh", "10", "20", "100", "200", "25.0%", "2"]
    assert "取用词元数" in page.by_id("choosing").text("zh")


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run\.json does not exist"):
        build_report(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"stages": 3}', '{"stages": {"a": 1}}'])
def test_a_damaged_record_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        build_report(str(tmp_path))


def test_the_page_stays_small_when_a_stage_has_rejected_a_great_deal(tmp_path: Path, html: str) -> None:
    run = build_run(tmp_path)
    path = next((run / "web").iterdir()) / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["rejects"] = manifest["rejects"] * 500  # as many files
    path.write_text(json.dumps(manifest), "utf-8")
    assert len(_built(run)[0]) < 1.2 * len(html)


def _diagnosed(run: Path, **changes: object) -> dict[str, Any]:
    """A run with a diagnosis of `chat` on file."""
    symptoms = [
        diagnose.judged("repetition", 0.7, 0.3, before=0.1),
        diagnose.judged("refusal", 0.5, 0.1, before=0.5, note=("<b>note</b>", "说明")),
        diagnose.judged("copied", 0.0, 0.25),
        diagnose.Symptom("invalid_words", "unmeasured", note=diagnose.NOTES["no_base"]),
    ]
    told = {
        "stage": "chat", "base": "base", "model": _manifest(run, "chat").fingerprint,
        "symptoms": [{"en": symptom.as_json("en"), "zh": symptom.as_json("zh")} for symptom in symptoms],
        "replies": [{"group": "harmless", "lang": "zh", "text": "问", "reply": "<script>", "before": "以前"}], **changes,
    }  # fmt: skip
    (run / "diagnosis.json").write_text(json.dumps({"stages": {"chat": told}}))
    return told


def test_a_diagnosis_on_file_is_shown_with_its_remedies_in_both_languages(run_copy: Path) -> None:
    _diagnosed(run_copy)
    _, page = _built(run_copy)
    section = page.by_id("diagnosis")
    rows = [row.text() for row in section.all("tr")[1:]]
    assert [next(word for word in ("BAD", "bad before", "not measured", "ok") if word in row) for row in rows] == [
        "BAD", "bad before", "not measured", "ok",
    ]  # fmt: skip
    assert "fewer epochs" in rows[0] and "0.7" in rows[0] and "0.1" in rows[0]
    chinese = section.text("zh")
    assert "减少训练轮数" in chinese and "训练前已有" in chinese and "说明" in chinese and "fewer" not in chinese
    assert "<b>note</b>" in section.text(), "escaped"
    assert "<script>" in section.text() and not section.all("script")
    assert "an earlier model" not in section.text()


def test_a_diagnosis_of_an_earlier_model_says_so_and_a_damaged_one_breaks_nothing(run_copy: Path) -> None:
    _diagnosed(run_copy, model="another")
    assert "an earlier model" in _built(run_copy)[1].by_id("diagnosis").text()
    for content in ("{", '{"stages": {"chat": {"stage": "chat"}}}', "[]"):
        (run_copy / "diagnosis.json").write_text(content)
        assert "diagnosis.json" in _built(run_copy)[1].by_id("diagnosis").text()
