"""The parts of the report one by one: messages, excerpts, numbers, differences, charts, the lineage drawing, samples."""

from __future__ import annotations

import re
import string
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipelines.report
from operators import shards
from pipelines.report import charts, differences, excerpts, figures, samples
from pipelines.report.charts import Segment, Series
from pipelines.report.lineage import drawing, layers
from pipelines.report.messages import MESSAGES
from pipelines.report.view import RunView, StageView, load_run

_SOURCES = [
    path
    for path in Path(pipelines.report.__file__).parent.iterdir()
    if path.suffix in (".py", ".jinja") and path.name != "messages.py"
]
_OPEN_FAMILIES = ("unit.", "kind.", "lang.", "status.", "section.")  # the last part comes from data


def _fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_message_is_there_in_both_languages_with_the_same_values() -> None:
    for key, (english, chinese) in MESSAGES.items():
        assert english.strip(), key
        assert chinese.strip(), key
        assert all(_fields(form) == _fields(chinese) for form in english.split("|")), key
        assert "|" not in chinese, key


def test_chinese_messages_are_chinese() -> None:
    for key, (_, chinese) in MESSAGES.items():
        assert re.search("[\u4e00-\u9fff]", chinese), key


def test_every_message_is_used_and_every_used_message_exists() -> None:
    code = "\n".join(path.read_text("utf-8") for path in _SOURCES)
    used = set(re.findall(r"""["']([a-z]+\.[a-z_]+)["']""", code))
    families = {key.split(".")[0] for key in MESSAGES}
    asked = {key for key in used if key.split(".")[0] in families and not key.endswith((".jinja", ".css", ".js", ".json", ".html"))}
    assert asked - set(MESSAGES) == set()
    assert {key for key in set(MESSAGES) - used if not key.startswith((*_OPEN_FAMILIES, "training."))} == set()


def test_english_counts_one_and_many() -> None:
    assert excerpts.sentence("lineage.rows", 0, n="1") == "1 row"
    assert excerpts.sentence("lineage.rows", 0, n="1,001") == "1,001 rows"
    assert excerpts.sentence("lineage.rows", 1, n="1") == "1 行"


@given(st.text())
def test_nothing_invisible_survives(text: str) -> None:
    shown = excerpts.visible(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", shown)
    shown.encode("utf-8")
    markup = str(excerpts.marked(text))
    assert "<" not in markup.replace('<b class="ctl">', "").replace("</b>", "")


@given(st.text(st.characters(blacklist_categories=("Cc", "Cf", "Cs", "Cn", "Zl", "Zp"))))
def test_ordinary_text_of_any_script_is_left_alone(text: str) -> None:
    plain = re.sub("[\ufe00-\ufe0e\u180b-\u180f]", "", text)
    assert excerpts.visible(plain) == plain


def test_a_language_tag_must_be_one() -> None:
    assert excerpts.language_attribute("zh-Hans") == ' lang="zh-Hans"'
    assert excerpts.language_attribute('en" onload="x') == ""
    assert excerpts.language_attribute(None) == ""


def test_an_excerpt_counts_what_it_leaves_out() -> None:
    assert "1,990" not in excerpts.excerpt("字" * 700)
    assert "余 100 字" in excerpts.excerpt("字" * 700)
    assert "9400 more characters" in excerpts.excerpt("a" * 2000, total=10_000)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (-5, "−5"),
        (0.123456, "0.123"),
        (12.346, "12.35"),
        (0.00001, "1.0e−5"),
        (float("inf"), "∞"),
        (None, "–"),
        (True, "–"),
    ],
)
def test_numbers_read_well(value: object, shown: str) -> None:
    assert figures.number(value) == shown


def test_a_share_is_never_rounded_to_nothing_or_to_everything() -> None:
    assert figures.percent(1, 1_000_000) == "<0.1%"
    assert figures.percent(999_999, 1_000_000) == ">99.9%"
    assert (figures.percent(0, 5), figures.percent(5, 5), figures.percent(1, 0)) == ("0%", "100%", "–")


def test_durations_and_sizes() -> None:
    assert [figures.duration(s) for s in (0, 0.44, 59.4, 133, 11_100)] == ["0s", "0.4s", "59s", "2m 13s", "3h 05m"]
    assert [figures.size(n) for n in (0, 2048, 25 << 30)] == ["0 B", "2.0 KiB", "25.0 GiB"]


@given(st.text(alphabet="ab 的了，。\n", max_size=120), st.text(alphabet="ab 的了，。\n", max_size=120))
def test_both_texts_can_be_read_back_from_their_difference(kept: str, removed: str) -> None:
    pieces = differences.difference(kept, removed)
    assert "".join(piece.text for piece in pieces if piece.kind != "removed") == kept
    assert "".join(piece.text for piece in pieces if piece.kind != "kept") == removed


def test_english_differs_by_words_and_chinese_by_characters() -> None:
    english = differences.difference("the second century", "the third century")
    assert [(p.kind, p.text) for p in english] == [("same", "the "), ("kept", "second"), ("removed", "third"), ("same", " century")]
    chinese = differences.difference("开凿于公元六世纪", "开凿于公元七世纪")
    assert [(p.kind, p.text) for p in chinese] == [("same", "开凿于公元"), ("kept", "六"), ("removed", "七"), ("same", "世纪")]


def test_repeated_passages_stay_aligned() -> None:
    text = "运河开凿于公元六世纪，连接南北两大水系。" * 12
    changed = [p.text for p in differences.difference(text, text.replace("六", "七")) if p.kind in ("kept", "removed")]
    assert changed == ["六", "七"] * 12


def test_where_texts_were_cut_is_no_difference() -> None:
    pieces = differences.difference("one two three", "zero one two", clipped=True)
    assert [(p.kind, p.text) for p in pieces] == [("removed", "zero "), ("same", "one two"), ("cut", "")]


def test_long_equal_stretches_become_gaps() -> None:
    pieces = differences.difference("same words " * 100 + "left", "same words " * 100 + "right")
    assert [piece.kind for piece in pieces] == ["gap", "same", "kept", "removed"]


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_span_the_data_with_few_round_steps(low: float, extent: float) -> None:
    ticks = charts.nice_ticks(low, low + extent)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    slack = 1e-6 * (abs(low) + extent)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + extent - slack


def test_a_bar_shows_shares_and_does_not_overflow() -> None:
    svg = ET.fromstring(str(charts.bar([Segment(900, "kept", "a"), Segment(1, "lost", '"<b>'), Segment(0, "odd", "none")], 1000)))
    marks = svg.findall("rect")[1:]
    assert [mark.get("class") for mark in marks] == ["kept", "lost"]
    assert marks[0].get("width") == "90.000%"
    assert sum(float(str(mark.get("width"))[:-1]) for mark in marks) <= 100
    assert marks[1].get("data-tip") == '"<b>'


def test_a_line_chart_survives_losses_that_are_no_numbers() -> None:
    points = [(1.0, 3.0), (2.0, float("nan")), (3.0, float("inf")), (4.0, 2.0)]
    svg = ET.fromstring(str(charts.lines([Series("base", "s1", points), Series("empty", "s2", [])], x_name="step")))
    assert [mark.get("data-tip") for mark in svg.iter("g")] == ["step 1 · base 3", "step 4 · base 2"]
    assert charts.lines([Series("a", "s1", [(1.0, float("nan"))])]) == ""
    assert ET.fromstring(str(charts.lines([Series("a", "s1", [(5.0, 1.0)])]))) is not None


def test_a_long_curve_is_thinned_to_points_of_itself() -> None:
    points = [(float(step), step * 0.5) for step in range(100_000)]
    thin = charts.thin(points)
    assert len(thin) == charts.MAX_POINTS
    assert set(thin) <= set(points)
    assert (thin[0], thin[-1]) == (points[0], points[-1])


def test_histograms_and_dots_are_well_formed_for_strange_labels() -> None:
    histogram = ET.fromstring(str(charts.histogram([("<a>", 3), ("\x00", 0), ("很长的标签" * 5, 10**9)])))
    assert len(list(histogram.iter("g"))) == 3
    dots = ET.fromstring(str(charts.dots([("zh 维基百科" * 6, [("base", "s1", 40.0), ("bad", "s2", -1.0)]), ("en", [])])))
    assert len([mark for mark in dots.iter("circle")]) == 1
    assert charts.dots([]) == ""


def test_layers_are_longest_paths_and_circles_are_refused() -> None:
    assert layers({"a": [], "b": ["a"], "c": ["a", "b"], "d": ["elsewhere"]}) == {"a": 0, "b": 1, "c": 2, "d": 0}
    with pytest.raises(ValueError, match="circle"):
        layers({"a": ["b"], "b": ["a"]})


def _svg(run: RunView) -> ET.Element:
    return ET.fromstring(re.sub(r'^<div class="fit"><svg.*?</svg>|</div>$', "", str(drawing(run))))


def _check_boxes(svg: ET.Element, count: int) -> None:
    _, _, width, height = map(float, str(svg.get("viewBox")).split())
    boxes: list[tuple[float, ...]] = []
    for box in (mark for mark in svg.iter("rect") if mark.get("class") == "box"):
        x, y, w, h = (float(str(box.get(name))) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height + 0.5
        for other_x, other_y, _, _ in boxes:
            assert abs(x - other_x) >= w or abs(y - other_y) >= h
        boxes.append((x, y, w, h))
    assert len(boxes) == count


def test_boxes_of_the_lineage_do_not_touch_and_stay_inside(finished_run: Path) -> None:
    run = load_run(str(finished_run))
    svg = _svg(run)
    _check_boxes(svg, 14)
    assert len(list(svg.iter("path"))) >= sum(len(stage.inputs) for stage in run.stages) - 4  # some share their way


@given(st.integers(1, 25).flatmap(lambda n: st.lists(st.sets(st.integers(0, 24), max_size=5), min_size=n, max_size=n)))
def test_any_recipe_can_be_drawn(reads: list[set[int]]) -> None:
    stages = [
        StageView(f"阶段<{n}>", "corpus", "", "", [f"阶段<{m}>" for m in sorted(reads[n]) if m < n], "pending", 0.0, False)
        for n in range(len(reads))
    ]
    _check_boxes(_svg(RunView("runs/x", "x", "", stages, "", 0.0, {}, "", None)), len(stages))


def test_samples_read_few_files_and_short_texts(finished_run: Path) -> None:
    stage = load_run(str(finished_run)).stage("web")
    found = samples.rejected_rows(stage, each=2)
    assert stage.manifest is not None
    assert set(stage.manifest.ledger.rejected) < set(found)  # and the quarantined ones
    assert all(len(rows) <= 2 for rows in found.values())
    long = found["gopher_quality:too_long"][0]
    assert len(long["text"]) == samples.TEXT_CHARACTERS < long["characters"]
    assert samples.spread(list(range(1000))) == [0, 125, 250, 375, 500, 625, 750, 875]


def test_a_row_group_of_enormous_texts_is_shown_without_them(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_TEXT_BYTES", 1000)
    rows = samples.rejected_rows(load_run(str(finished_run)).stage("web"))
    assert rows
    assert all("text" not in row for group in rows.values() for row in group)


def test_example_rows_are_read_through_removal(finished_run: Path) -> None:
    rows = samples.first_rows(load_run(str(finished_run)).stage("clean"), ["id", "text", "no_such_column"])
    assert [row["id"] for row in rows[:7]] == [f"web-{n:05d}" for n in (0, 1, 2, 3, 4, 6, 7)]
    assert shards.load_manifest(str(next((finished_run / "clean").iterdir()))).view is not None


def test_rare_groups_are_among_the_examples() -> None:
    rows = [{"lang": "en", "n": n} for n in range(50)] + [{"lang": "zh", "n": 50}]
    assert [row["n"] for row in samples.varied(rows, lambda row: row["lang"], 4)] == [0, 50, 1, 2]
