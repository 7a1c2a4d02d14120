"""Verifiable rewards: the same answer however it is written, forms that are kept or not, and replies that nothing can digest."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from operators.config import SettingsError
from train import verify
from train.settings_alignment import Check, GrpoSettings
from train.verify import Batch, chosen_letters, final_answer, quantity, same_answer

CHECK: TypeAdapter[Any] = TypeAdapter(Check)


def scores(check: dict[str, Any], replies: list[str], reference: str | None = None, asked: str = "How many?") -> list[float]:
    batch = Batch([[{"role": "user", "content": asked}]] * len(replies), replies, [reference] * len(replies), [True] * len(replies))
    found = verify.function_of(CHECK.validate_python(check))(batch)
    assert not found.failures
    return [float(value) for value in found.values]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is \\boxed{\\frac{1}{2}} or rather \\boxed{42}", "42"),
        ("<think>1 + 1 = 3, answer: 3</think><answer> 2 </answer>", "2"),
        ("<think>Answer: 9</think>Then the answer is 7.", "7."),
        ("Natalia sold 48+24 = 72 clips.\n#### 72", "72"),
        ("一共是三百二十个。\n答案：３２０", "320"),
        ("最终答案是 北京。\n谢谢", "北京。"),
        ("The final answer is: Paris\nBye", "Paris"),
        ("<answer>答案：五</answer>", "五"),
        ("just this", "just this"),
        ("\\boxed{broken", "\\boxed{broken"),
        ("答案：", ""),
    ],
)
def test_the_answer_is_taken_from_where_replies_put_it(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", 1234.5),
        ("１２", 12),
        ("-3/4", -0.75),
        ("\\frac{3}{8}", 0.375),
        ("12%", 0.12),
        ("百分之十二", 0.12),
        ("3.5万", 35000),
        ("三百二十", 320),
        ("两千零五", 2005),
        ("一亿二千万", 120_000_000),
        ("负三点一四", -3.14),
        ("三分之一", 1 / 3),
        ("二〇二三", 2023),
        ("twenty-five", 25),
        ("$18", 18),
        ("72 apples", 72),
        ("15元", 15),
        ("-5", -5),
        ("1.2e-3", 0.0012),
        ("2 × 10^3", 2000),
        ("about 5", None),
        ("5 or 6", None),
        ("", None),
        ("1/0", None),
        ("苹果", None),
    ],
)
def test_a_number_is_its_value_in_english_and_chinese(text: str, value: float | None) -> None:
    assert quantity(text) == (value if value is None else pytest.approx(value, rel=1e-9))


@pytest.mark.parametrize(
    ("reply", "reference", "same"),
    [
        ("答案：三百二十", "320", True),
        ("The answer is 1,000.", "#### 1000", True),
        ("ＢＥＩＪＩＮＧ ", "beijing", True),
        ("北 京。", "北京", True),
        ("\\boxed{\\text{Paris}}", "paris", True),
        ("0.5", "1/2", True),
        ("Paris or Rome", "Paris", False),
        ("321", "320", False),
        ("", "320", False),
        ("I think 320 is wrong, it is 319", "320", False),
        ("十二", "１２", True),
        ("北京", "上海", False),
    ],
)
def test_exact_answers_are_compared_as_values(reply: str, reference: str, same: bool) -> None:
    assert same_answer(reply, reference) is same
    assert scores({"check": "exact"}, [reply], reference) == [float(same)]


def test_a_numeric_answer_may_differ_a_little_and_stand_among_words() -> None:
    check = {"check": "numeric", "relative": 0.01}
    given = ["The answer is about 3.14 metres", "3.2", "大约是三点一四", "none", "x = 3.1415"]
    assert scores(check, given, "3.1416") == [1, 0, 1, 0, 1]


def test_a_check_without_a_reference_does_not_apply() -> None:
    for check in ("exact", "numeric", "choice"):
        assert math.isnan(scores({"check": check}, ["7"], None)[0])
    assert math.isnan(scores({"check": "choice"}, ["B"], "no letter here at all")[0])


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("B", "B"),
        ("（Ｂ）", "B"),
        ("The answer is (C).", "C"),
        ("选 B", "B"),
        ("答案：D", "D"),
        ("B. Because rivers flow down", "B"),
        ("\\boxed{A}", "A"),
        ("答案：ＡＣ", "AC"),
        ("A, C and D", "ACD"),
        ("I would say option D", "D"),
        ("因此应选C。", "C"),
        ("A river runs to the sea", None),
        ("no idea", None),
    ],
)
def test_the_letters_of_a_choice(text: str, letters: str | None) -> None:
    assert chosen_letters(text, "ABCDEFGHIJ") == (None if letters is None else frozenset(letters))


def test_choices_are_compared_as_sets() -> None:
    assert scores({"check": "choice"}, ["A and B", "BA", "A"], "AB") == [1, 1, 0]


def test_tags_stand_once_in_order_with_nothing_around_them() -> None:
    replies = [
        "<think>想一想</think>\n<answer>7</answer>\n",
        "<answer>7</answer><think>x</think>",
        "Well: <think>x</think><answer>7</answer>",
        "<think>x</think><answer> </answer>",
        "<think>x</think><answer>7</answer><answer>8</answer>",
        "<think>x</think>",
        "7",
    ]
    assert scores({"check": "tags"}, replies) == [1, 0, 0, 0, 0, 0, 0]
    assert scores({"check": "tags", "partial": True}, replies) == [1, 0.5, 0.5, 0.5, 0.25, 0.25, 0]


def test_a_pattern_that_backtracks_without_end_is_a_failure_that_is_counted() -> None:
    check = CHECK.validate_python({"check": "pattern", "pattern": r"(a|aa)+b", "timeout_s": 0.05})
    batch = Batch([[]] * 3, ["ab", "a" * 80 + "c", "aab"], [None] * 3, [True] * 3)
    found = verify.function_of(check)(batch)
    assert found.values.tolist() == [1, 0, 1]
    assert list(found.failures) == [1]
    assert "Timeout" in found.failures[1]


def test_json_is_the_whole_reply_and_fits_its_schema() -> None:
    schema = {"type": "object", "required": ["名"], "properties": {"名": {"type": "string"}}}
    replies = ['{"名": "炉"}', '```json\n{"名": "炉"}\n```', 'Sure: {"名": "炉"}', '{"名": 3}', "[1, 2", "NaN", "[" * 5000, ""]
    assert scores({"check": "json"}, replies) == [1, 1, 0, 1, 0, 0, 0, 0]
    assert scores({"check": "json", "json_schema": schema}, replies) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert scores({"check": "json", "part": "answer"}, ["<think>x</think><answer>[1]</answer>", "[1]"]) == [1, 0]


def test_a_schema_is_never_fetched() -> None:
    batch = Batch([[]], ["{}"], [None], [True])
    found = verify.function_of(CHECK.validate_python({"check": "json", "json_schema": {"$ref": "http://127.0.0.1:9/x"}}))(batch)
    assert found.values.tolist() == [0]
    assert list(found.failures) == [0]


def test_xml_is_well_formed_and_expands_no_entities() -> None:
    bomb = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><a>&c;</a>'
    replies = ["<文><字/></文>", '<?xml version="1.0" encoding="gbk"?>\n<a>é</a>', "<a><b></a>", "<a/><b/>", bomb, "text", ""]
    assert scores({"check": "xml"}, replies) == [1, 1, 0, 0, 0, 0, 0]
    assert scores({"check": "xml", "root": "a"}, replies[:2]) == [0, 1]


def test_sql_parses_and_nothing_of_it_is_run(tmp_path: Any) -> None:
    outside = tmp_path / "made.db"
    replies = [
        "SELECT 名 FROM 表 WHERE x > 1;",
        "```sql\nSELECT a, count(*) FROM t GROUP BY a HAVING count(*) > 1\n```",
        "INSERT INTO t VALUES ('a;b'); SELECT 1",
        "SELECT FROM WHERE",
        "SELECT 'unclosed",
        f"ATTACH DATABASE '{outside}' AS x",
        "PRAGMA journal_mode=WAL",
        "",
        "hello",
    ]
    assert scores({"check": "sql"}, replies) == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert not outside.exists()
    known = {"check": "sql", "tables": "CREATE TABLE t (a TEXT);"}
    assert scores(known, ["SELECT a FROM t", "SELECT b FROM t", "SELECT a FROM u", "INSERT INTO t VALUES ('x')"]) == [1, 0, 0, 1]


def test_lengths_are_words_in_english_and_characters_in_chinese() -> None:
    check = {"check": "length", "least": 3, "most": 5, "slack": 4}
    assert scores(check, ["one two three", "one", "一二三四五", "一二三四五六七", "", "a b c d e f g h i j k"]) == [
        1, 0.5, 1, 0.5, 0.25, 0,
    ]  # fmt: skip


def test_a_chinese_prompt_wants_a_chinese_reply() -> None:
    replies = [
        "河流流向大海。",
        "Rivers flow to the sea.",
        "用 Python 写：\n```python\nprint('rivers flow')\n```\n这样就可以了。",
        "",
    ]
    assert scores({"check": "language"}, replies, asked="介绍一下河流") == [1, 0, 1, 0]
    assert scores({"check": "language"}, replies, asked="Tell me about rivers") == [0, 1, 0, 0]
    assert math.isnan(scores({"check": "language"}, ["42"], asked="多少？")[0])


def test_loops_are_penalised_in_both_languages() -> None:
    found = scores(
        {"check": "repetition"}, ["the cat sat " * 30, "炉火慢慢" * 30, "Each word here differs from every other one", "短"]
    )
    assert found[0] < -0.9
    assert found[1] < -0.9
    assert found[2:] == [0, 0]


def test_a_cut_reply_is_not_finished() -> None:
    function = verify.function_of(CHECK.validate_python({"check": "finished"}))
    assert function(Batch([[]] * 2, ["a", "b"], [None] * 2, [True, False])).values.tolist() == [1, 0]


def test_a_function_of_the_users_own_gets_the_batch_and_its_failures_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("rewards_of_a_test")

    def shout(batch: Batch, mark: str) -> list[float | None]:
        return [1 / (len(reply) - 1) if mark in reply else None for reply in batch.replies]

    module.shout = shout  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rewards_of_a_test", module)
    check = {"check": "custom", "function": "rewards_of_a_test:shout", "arguments": {"mark": "!"}}
    found = verify.function_of(CHECK.validate_python(check))(Batch([[]] * 3, ["ab!", "!", "ab"], [None] * 3, [True] * 3))
    assert found.values[:2].tolist() == [0.5, 0]
    assert math.isnan(found.values[2])
    assert found.failures == {1: "ZeroDivisionError: division by zero"}
    with pytest.raises(SettingsError, match="cannot be imported"):
        verify.function_of(CHECK.validate_python({**check, "function": "rewards_of_a_test:absent"}))


EVERY: list[dict[str, Any]] = [
    {"check": "exact"}, {"check": "numeric"}, {"check": "choice"}, {"check": "pattern", "pattern": r"\d+"}, {"check": "tags"},
    {"check": "tags", "partial": True}, {"check": "json"}, {"check": "xml"}, {"check": "sql"},
    {"check": "length", "least": 2, "slack": 3}, {"check": "language"}, {"check": "repetition"}, {"check": "finished"},
]  # fmt: skip
PIECES = st.sampled_from(
    ["<answer>", "</answer>", "</think>", "\\boxed{", "}", "{", "[", "]", '"', "```", "\n", "答案：", "A", "十", "分之", "%", "/",
     "-", "1", "．", "SELECT", ";", "'", "<a>", "&", "\x00", "\ud800", "点", "亿", "e5", ",", " "]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join), st.text(max_size=6) | st.sampled_from(["12", "A", "三"]))
def test_nothing_that_a_model_writes_raises_and_a_score_is_a_function_of_the_reply(reply: str, reference: str) -> None:
    batch = Batch([[{"role": "user", "content": "多少?"}]] * 2, [reply, "7"], [reference] * 2, [True] * 2)
    for check in EVERY:
        function = verify.function_of(CHECK.validate_python(check))
        first, again = function(batch), function(batch)
        np.testing.assert_array_equal(first.values, again.values)
        assert ((first.values >= -1) & (first.values <= 1) | np.isnan(first.values)).all()
        assert set(first.failures) <= {0}
        np.testing.assert_array_equal(function(batch.row(0)).values, first.values[:1])


def test_rewards_that_cannot_be_are_refused_when_the_recipe_is_read() -> None:
    base: dict[str, Any] = {"steps": 1, "learning_rate": 1e-4, "rewards": {"right": {"check": "exact"}}}
    for given_, said in (
        ({"rewards": {}}, "at least 1"),
        ({"rewards": {"a b": {"check": "exact"}}}, "letters, digits and _ only"),
        ({"rewards": {"a": {"check": "exact", "weight": 0}}}, "nothing would be learned"),
        ({"rewards": {"a": {"check": "pattern", "pattern": "("}}}, "no valid regular expression"),
        ({"rewards": {"a": {"check": "sql", "tables": "CREATE TABEL"}}}, "no valid CREATE statements"),
        ({"rewards": {"a": {"check": "json", "json_schema": {"type": 3}}}}, "no valid JSON schema"),
        ({"rewards": {"a": {"check": "length"}}}, "needs `least` or `most`"),
        ({"algorithm": "rloo", "loss": "dapo"}, "`loss` belongs to `algorithm: grpo`"),
        ({"algorithm": "rloo", "scale_rewards": "group"}, "rloo knows `batch` and `none`"),
        ({"loss": "luspo"}, "needs `importance: sequence`"),
        ({"importance": "sequence"}, "would weight replies by length"),
        ({"vllm": {"mode": "server"}}, "needs `url`"),
        ({"vllm": {}, "sharding": "fsdp2"}, "takes whole weights"),
    ):
        with pytest.raises(ValueError, match=said):
            GrpoSettings(**{**base, **given_})
