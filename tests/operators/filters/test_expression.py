"""The expression filter: the same answers as a slow evaluator row by row, and errors that say where."""

from __future__ import annotations

import ast
import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.chain import Chain
from operators.config import SettingsError
from operators.filters.expression import FilterExpression
from operators.text import counts
from pipelines.stages.corpus import CorpusStage

NUMBERS, STRINGS, BOOLEANS = ("words", "alpha_ratio", "stars"), ("lang", "source"), ("checked",)
WORDS = ["zh", "en", "中文", "百科/历史", "a'b", ""]


def holds(node: ast.expr, row: dict[str, Any]) -> Any:
    """The slow reference: one row at a time, null as None."""
    match node:
        case ast.Constant(value):
            return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        case ast.Name(name):
            return row[name]
        case ast.BoolOp(operator, values):
            found = [holds(value, row) for value in values]
            decisive = isinstance(operator, ast.Or)
            return decisive if decisive in found else (None if None in found else not decisive)
        case ast.UnaryOp(ast.Not(), operand):
            found = holds(operand, row)
            return None if found is None else not found
        case ast.UnaryOp(operator, operand):
            found = holds(operand, row)
            return found if found is None or isinstance(operator, ast.UAdd) else -found
        case ast.BinOp(left, operator, right):
            a, b = holds(left, row), holds(right, row)
            if a is None or b is None or (isinstance(operator, ast.Div) and b == 0):
                return None
            found = a + b if isinstance(operator, ast.Add) else a - b if isinstance(operator, ast.Sub) else None
            found = a * b if isinstance(operator, ast.Mult) else a / b if isinstance(operator, ast.Div) else found
            return None if math.isnan(found) else found
        case ast.Compare(left, operators, rights):
            found, sides = [], [left, *rights]
            for operator, a, b in zip(operators, sides, sides[1:], strict=False):
                found.append(compare(operator, a, b, row))
            return False if False in found else None if None in found else True
        case ast.Call(ast.Name(name), arguments):
            values = [holds(argument, row) for argument in arguments]
            if None in values:
                return None
            if name == "log":
                return math.log(values[0]) if values[0] > 0 else None
            functions: dict[str, Any] = {
                "abs": abs, "min": min, "max": max, "length": lambda text: float(len(text)), "contains": lambda a, b: b in a,
                "starts_with": str.startswith, "ends_with": str.endswith,
            }  # fmt: skip
            return functions[name](*values)
    raise AssertionError(ast.dump(node))


def compare(operator: ast.cmpop, left: ast.expr, right: ast.expr, row: dict[str, Any]) -> Any:
    a = holds(left, row)
    if isinstance(operator, ast.Is | ast.IsNot):
        return (a is None) == isinstance(operator, ast.Is)
    if isinstance(operator, ast.In | ast.NotIn):
        assert isinstance(right, ast.List)
        return None if a is None else (a in [holds(item, row) for item in right.elts]) == isinstance(operator, ast.In)
    b = holds(right, row)
    if a is None or b is None:
        return None
    return {
        ast.Lt: lambda: a < b, ast.LtE: lambda: a <= b, ast.Gt: lambda: a > b, ast.GtE: lambda: a >= b, ast.Eq: lambda: a == b,
        ast.NotEq: lambda: a != b,
    }[type(operator)]()  # fmt: skip


literal = st.one_of(st.integers(-3, 60), st.sampled_from([0.6, 0.1, 1e300, 0.5])).map(repr)
word = st.sampled_from(WORDS).map(repr)
number = st.recursive(
    st.one_of(literal, st.sampled_from(NUMBERS)),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda x: f"(-{x})"),
        inner.map(lambda x: f"abs({x})"),
        inner.map(lambda x: f"log({x})"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
        st.sampled_from(STRINGS).map(lambda x: f"length({x})"),
    ),
    max_leaves=4,
)
text = st.one_of(word, st.sampled_from(STRINGS))
comparison = st.one_of(
    st.tuples(number, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), number).map(" ".join),
    st.tuples(number, st.sampled_from(["<", "<="]), number, st.sampled_from(["<", "<="]), number).map(" ".join),
    st.tuples(text, st.sampled_from(["==", "!="]), text).map(" ".join),
    st.tuples(
        text, st.sampled_from(["in", "not in"]), st.lists(word, min_size=1, max_size=3).map(lambda x: f"[{', '.join(x)}]")
    ).map(" ".join),
    st.tuples(st.sampled_from(["contains", "starts_with", "ends_with"]), text, word).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
    st.tuples(st.sampled_from([*NUMBERS, *STRINGS, *BOOLEANS]), st.sampled_from(["is None", "is not None"])).map(" ".join),
    st.sampled_from([*BOOLEANS, "True", "False"]),
)
boolean = st.recursive(
    comparison,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({t[0]}) {t[1]} ({t[2]})"),
        inner.map(lambda x: f"not ({x})"),
    ),
    max_leaves=5,
)
row = st.fixed_dictionaries(
    {
        "words": st.integers(0, 60),
        "alpha_ratio": st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.6, 0.61, 1.0])),
        "stars": st.one_of(st.none(), st.integers(-2, 5)),
        "lang": st.one_of(st.none(), st.sampled_from(WORDS)),
        "source": st.sampled_from(WORDS),
        "checked": st.one_of(st.none(), st.booleans()),
    }
)


@settings(max_examples=200, deadline=None)
@given(boolean, st.lists(row, min_size=1, max_size=5), st.sampled_from(["drop", "keep"]))
def test_an_expression_keeps_what_a_slow_evaluator_keeps(expression: str, rows: list[dict[str, Any]], nulls: str) -> None:
    operator = FilterExpression(keep=expression, nulls=nulls)
    table = pa.table(
        {
            "position": pa.array(range(len(rows))),
            "stars": pa.array([item["stars"] for item in rows], pa.int32()),
            "lang": pa.array([item["lang"] for item in rows], pa.string()),
            "source": pa.array([item["source"] for item in rows], pa.large_string()),
            "checked": pa.array([item["checked"] for item in rows], pa.bool_()),
        }
    )
    nan = [math.nan if item["alpha_ratio"] is None else item["alpha_ratio"] for item in rows]
    scores = {"words": pa.array([item["words"] for item in rows], pa.int64()), "alpha_ratio": pa.array(nan)}
    reason, _ = operator.decide(table, {key: value for key, value in scores.items() if key in operator.measured_as()})
    tree = ast.parse(expression, mode="eval").body
    wanted = [holds(tree, {**item, "words": float(item["words"])}) for item in rows]
    assert [item is None for item in reason.to_pylist()] == [
        value is True or (value is None and nulls == "keep") for value in wanted
    ]


ENGLISH = "The committee met on Tuesday to discuss the plan. " * 20
CHINESE = "委员会星期二开会讨论新图书馆的建设方案。" * 20


def test_an_expression_stands_in_a_chain_and_says_which_part_failed() -> None:
    table = pa.table(
        {"id": list("abcd"), "text": [ENGLISH, CHINESE, "short", "1234 5678 " * 60], "source": ["网页", "网页", "网页", "书"]}
    )
    keep = "words >= 50 and (alpha_ratio > 0.6 or lang == 'zh') and source == '网页'"
    result = Chain(["detect_language", {"filter_expression": {"keep": keep}}]).run(
        table.filter(pa.array([True, True, False, False]))
    )
    assert result.kept["id"].to_pylist() == ["a", "b"]
    verdict = FilterExpression(keep="words >= 50 and alpha_ratio > 0.6 and source == '网页'").process(table)
    assert verdict.reason is not None and verdict.value is not None
    assert verdict.reason.to_pylist() == [None, None, "words", "alpha_ratio"]
    assert verdict.value.to_pylist() == [None, None, 1.0, 0.0]


def test_what_is_null_is_dropped_by_its_own_reason_or_kept() -> None:
    table = pa.table({"text": ["", "abc"], "quality": pa.array([0.9, None], pa.float32())})
    drop, keep = (
        FilterExpression(keep="alpha_ratio > 0.5 and quality > 0.2", nulls=nulls).process(table) for nulls in ("drop", "keep")
    )
    assert drop.reason is not None and drop.reason.to_pylist() == ["null_alpha_ratio", "null_quality"]
    assert keep.kept().num_rows == 2


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("", "invalid syntax"),
        ("words >=", "at character 9"),
        ("lang == “zh”", "at character 9"),
        ("中文 == '好' and wrods(3) > 2", "unknown function 'wrods'.* at character 15"),
        ("__import__('os').system('x') == 0", "unknown function .* at character 1"),
        ("words.real > 2", "Attribute is not allowed at character 1"),
        ("(lambda: 1)() > 0", "unknown function"),
        ("[x for x in lang] == 1", "ListComp is not allowed"),
        ("words ** 2 > 4", "operator Pow is not allowed"),
        ("words % 2 == 0", r"allowed: \+ - \* /"),
        ("words > '五十'", "a number is compared with a string"),
        ("lang > 'a'", "a number is wanted, not a string"),
        ("words", "a boolean is wanted, not a number"),
        ("words and True", "a boolean is wanted"),
        ("lang in 'zh'", "takes a list of constants"),
        ("lang in ['zh', 3]", "constants of one kind"),
        ("contains(lang, source)", "takes a column and a string"),
        ("contians(url, 'a')", "did you mean 'contains'"),
        ("contains(text, 'a')", "only measures of it"),
        ("words is 3", "only None"),
        ("f'{words}' == 'a'", "JoinedStr is not allowed"),
        ("words > 1" + "0" * 400, "too large"),
        ("not " * 300 + "True", "nested deeper|cannot be read"),
        ("(" * 4900 + "True" + ")" * 4900, "cannot be read|too many nested"),
        ("words > 3 or " * 2000 + "True", "at most 10,000"),
        ("lang == '\\ud800'", "surrogate"),
        ("lang == b'zh'", "is not allowed"),
        ("(words := 3) > 2", "NamedExpr is not allowed"),
        ("words > 3; lang", "at character 10"),
        ("words > 3\x00", "null|invalid"),
    ],
)
def test_what_is_no_expression_is_refused_with_its_place(keep: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        FilterExpression(keep=keep)


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.text(max_size=30),
        st.lists(
            st.sampled_from([*NUMBERS, *STRINGS, "(", ")", "<", "and", "not", "'中'", "3", ",", "in", "[", "]", "\\", "é"]),
            max_size=9,
        ).map(" ".join),
    )
)
def test_any_string_is_an_expression_or_a_settings_error(keep: str) -> None:
    try:
        operator = FilterExpression(keep=keep)
    except SettingsError:
        return
    assert operator.config.keep == keep


def test_a_column_that_is_not_there_is_named_with_its_place_and_the_nearest() -> None:
    table = pa.table({"text": ["a"], "lang": ["en"], "tags": [["x"]]})
    with pytest.raises(SettingsError, match=r"no column 'wrods' \(character 16 of .* did you mean 'words'"):
        Chain([{"filter_expression": {"keep": "lang == '中' or wrods > 3"}}]).run(table)
    with pytest.raises(SettingsError, match="column 'tags' is list"):
        Chain([{"filter_expression": {"keep": "tags == 'x'"}}]).run(table)
    with pytest.raises(SettingsError, match="column 'lang_score' is string where a number is wanted"):
        Chain([{"filter_expression": {"keep": "lang_score > 2"}}]).run(pa.table({"text": ["a"], "lang_score": ["x"]}))


def test_a_misspelt_column_is_told_when_the_recipe_is_read() -> None:
    recipe = {"kind": "corpus", "read": {"path": "x.jsonl", "columns": ["stars:int64"]}}
    for keep in ("stars > 3 and lang == 'zh' and 质量 > 2", "lang_score > 0.5"):
        CorpusStage.model_validate(
            {**recipe, "operators": ["detect_language", {"filter_expression": {"keep": keep}}]}
        ).validate_deep()
    for keep, near in (
        ("lang == '中' and alpha_ratios > 0.5", "alpha_ratio"),
        ("star > 3", "stars"),
        ("lang_scor > 3", "lang_score"),
    ):
        stage = CorpusStage.model_validate({**recipe, "operators": ["detect_language", {"filter_expression": {"keep": keep}}]})
        with pytest.raises(SettingsError, match=f"did you mean '{near}'"):
            stage.validate_deep()


def test_only_what_is_asked_for_is_measured() -> None:
    table = pa.table({"text": ["a b"], "lang": ["en"]})
    assert set(FilterExpression(keep="characters > 1").measure(table)) == set(counts.CHARACTER_MEASURES)
    assert set(FilterExpression(keep="words > 1").measure(table)) == set(counts.WORD_MEASURES)
    assert FilterExpression(keep="lang == 'en'").measure(table) == {}
