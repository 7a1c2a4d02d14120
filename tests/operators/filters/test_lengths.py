"""Length and ratio filters: measures equal a plain computation on any text, limits hold by language."""

from __future__ import annotations

import math
import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.chain import Chain
from operators.config import SettingsError
from operators.filters.lengths import FilterLengths, FilterRatios
from operators.text import characters, counts
from operators.text.analysis import Analysis

ENGLISH = "The committee met on Tuesday to discuss the plan."
CHINESE = "委员会星期二开会讨论新图书馆的建设方案。"
TEXTS = st.text(
    st.one_of(st.sampled_from("aZé中〇々ー๑٣９ \n\t\u3000，。+$😀-"), st.characters(exclude_categories=["Cs"])), max_size=60
)


def naive(text: str) -> dict[str, float]:
    flags = characters.table()

    def kind(character: str) -> str:
        point = ord(character)
        bits = int(flags[point]) if point < characters.TABLE_SIZE else 0
        if bits & characters.HAN:
            return "han"
        if character.isspace():
            return "space"
        if point >= characters.TABLE_SIZE:
            return "other"
        category = unicodedata.category(character)
        named = {"Lu": "upper", "Lt": "upper", "Ll": "lower", "Lo": "caseless", "Lm": "caseless", "Nd": "digit"}
        return named.get(category, {"P": "punctuation", "S": "symbol"}.get(category[0], "other"))

    kinds = [kind(character) for character in text]
    lines = [line for line in text.split("\n") if line.strip()]
    share = {name: kinds.count(name) / len(text) if text else math.nan for name in set(kinds)}
    cased = kinds.count("upper") + kinds.count("lower")
    size, han = len(text.encode()), kinds.count("han")
    letters = cased + kinds.count("caseless") + han
    return {
        "characters": len(text),
        "bytes": size,
        "lines": len(lines),
        "mean_line_length": sum(map(len, lines)) / len(lines) if lines else math.nan,
        "longest_line": max(map(len, lines), default=0),
        "tokens": math.ceil((65 * han + 25 * max(size - 3 * han, 0)) / 100),
        "alpha_ratio": letters / len(text) if text else math.nan,
        **{
            f"{name}_ratio": share.get(name, 0.0) if text else math.nan
            for name in ("digit", "space", "punctuation", "symbol", "han")
        },
        "upper_ratio": kinds.count("upper") / cased if cased else math.nan,
    }


def test_measures_equal_a_plain_computation_on_any_text() -> None:
    @settings(max_examples=200, deadline=None)
    @given(st.lists(TEXTS, max_size=3))
    def check(texts: list[str]) -> None:
        found = counts.count(Analysis.of(pa.array(texts, pa.large_string())), counts.CHARACTER_MEASURES)
        for row, text in enumerate(texts):
            for name, value in naive(text).items():
                assert found[name][row] == pytest.approx(value, nan_ok=True, abs=0), (name, text)

    check()
    words = counts.count(Analysis.of(pa.array([ENGLISH, "", "。。。"])), counts.WORD_MEASURES)
    assert words["words"].tolist() == [9, 0, 0]
    assert words["longest_word"].tolist() == [9, 0, 0]
    assert words["mean_word_length"][0] == 40 / 9 and math.isnan(words["mean_word_length"][1])


def test_limits_hold_for_all_languages_unless_one_has_its_own() -> None:
    table = pa.table({"text": [ENGLISH, CHINESE, "Hi", "你好", ""], "lang": ["en", "zh-Hans", "en", "zh", None]})
    operator = FilterLengths(min_characters=30, thresholds={"zh": {"min_characters": 10, "max_lines": 5}})
    verdict = operator.process(table)
    assert verdict.reason is not None and verdict.value is not None
    assert verdict.reason.to_pylist() == [None, None, "min_characters", "min_characters", "min_characters"]
    assert verdict.value.to_pylist() == [None, None, 2.0, 2.0, 0.0]


def test_ratios_reject_by_the_name_of_the_limit() -> None:
    texts = [ENGLISH, CHINESE, "12345 67890 a", "SHOUTING ALL DAY", "!!!???...", "", "\n \n"]
    operator = FilterRatios(
        max_digit_ratio=0.3, max_punctuation_ratio=0.4, max_space_ratio=0.5, thresholds={"en": {"max_upper_ratio": 0.5}}
    )
    verdict = operator.process(pa.table({"text": texts}))
    assert verdict.reason is not None
    assert verdict.reason.to_pylist() == [
        None, None, "max_digit_ratio", "max_upper_ratio", "max_punctuation_ratio", None, "max_space_ratio",
    ]  # fmt: skip
    han = Chain([{"filter_ratios": {"min_han_ratio": 0.5}}]).run(pa.table({"id": ["a", "b"], "text": [ENGLISH, CHINESE]}))
    assert han.kept["id"].to_pylist() == ["b"]
    assert dict(han.rejected) == {"filter_ratios:min_han_ratio": 1}


def test_a_filter_without_a_limit_and_a_share_above_one_are_refused() -> None:
    with pytest.raises(SettingsError, match="set at least one limit"):
        FilterLengths()
    with pytest.raises(SettingsError, match="max_digit_ratio is a share of 0 to 1, got 30"):
        FilterRatios(thresholds={"en": {"max_digit_ratio": 30}})
    with pytest.raises(SettingsError, match="did you mean 'max_digit_ratio'"):
        FilterRatios(max_digits_ratio=0.3)


def test_a_huge_line_and_odd_bytes_pass_through() -> None:
    texts = ["x" * 3_000_000, "\x00" * 10, "\u202e‏مرحبا", "e\u0301" * 5, "👩‍👩‍👧"]
    verdict = FilterLengths(max_longest_line=1_000_000).process(pa.table({"text": texts}))
    assert verdict.reason is not None
    assert verdict.reason.to_pylist() == ["max_longest_line", None, None, None, None]
