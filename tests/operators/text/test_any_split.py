"""What holds for every row-local operator: no row depends on its batch, and plain Ray Data can use it."""

from __future__ import annotations

import itertools
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import registry
from operators.operator import Operator

TEXTS = [
    "The committee met on Tuesday to discuss the new library, and most of its members agreed with the plan. " * 4,
    "今天下午，委员会讨论了新图书馆的建设方案，大多数成员都同意这个计划，并决定明年开始施工。" * 4,
    "",
    " \n\n\t ",
    "Home | Login\nCopyright © 2020 All rights reserved\nreal text is here, mail me at a@b.com or 13800138000",
    "首页 > 登录\n版权所有\n内容在这里，邮箱 x@163.com",
    "FranÃ§ois\r\n\x00\u200b and\u00a0more…",
    "日本語の文章です。\nカタカナ",
    "### --- ... {} lorem ipsum",
    "you ass, 傻逼",
    "line\n" * 30,
    "重复的句子。" * 30,
    "😀 emoji \U00020000\u0301",
    "---\ntitle: x\n---\n# 標題 [連結](http://a.b),好吗?\n```\n[code](x)\n```",
    "\\documentclass{a}\n\\begin{document}\n\\textbf{中文},公式 $x^2$\n\\end{document}",
    None,
]
OPTIONS: dict[str, dict[str, Any]] = {
    "extract_html": {},
    "fix_text": {},
    "strip_boilerplate": {},
    "detect_language": {"keep": ["en", "zh"]},
    "gopher_quality": {},
    "gopher_repetition": {},
    "c4_quality": {"min_sentences": 2},
    "fineweb_quality": {},
    "bad_words": {"action": "mask", "always": ["en"]},
    "redact_pii": {},
    "normalise_chinese": {"convert": "t2s"},
    "strip_markdown": {"marks": "drop"},
    "strip_latex": {"maths": "replace"},
}


def table_for(name: str) -> pa.Table:
    texts = pa.array(TEXTS, pa.large_string())
    numbers = pa.array(range(len(TEXTS)))
    if name != "extract_html":
        return pa.table({"n": numbers, "text": texts})
    pages = [None if text is None else f"<html><body><p>{text}</p></body></html>".encode() for text in TEXTS]
    return pa.table({"n": numbers, "content": pa.array(pages, pa.large_binary())})


def together(operator: Operator, table: pa.Table) -> pa.Table:
    verdict = operator.process(table)
    missing = pa.nulls(table.num_rows)
    reason = missing.cast(pa.string()) if verdict.reason is None else verdict.reason
    value = missing.cast(pa.float64()) if verdict.value is None else verdict.value
    return verdict.table.append_column("reason", reason).append_column("value", value)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_any_split_of_a_table_gives_the_same_rows(name: str) -> None:
    operator, table = registry.build({name: OPTIONS[name]}), table_for(name)
    whole = together(operator, table)
    assert whole.num_rows == table.num_rows

    @settings(max_examples=12, deadline=None)
    @given(st.lists(st.integers(0, len(TEXTS)), max_size=5))
    def check(cuts: list[int]) -> None:
        bounds = [0, *sorted(cuts), len(TEXTS)]
        pieces = [together(operator, table.slice(a, b - a)) for a, b in itertools.pairwise(bounds)]
        assert all(piece.schema.equals(whole.schema) for piece in pieces), "an empty batch has the schema of a full one"
        assert pa.concat_tables(pieces).combine_chunks().equals(whole.combine_chunks())

    check()
    for row in range(table.num_rows):  # and so does each row alone, in an array with an offset
        assert together(operator, table.slice(row, 1)).to_pylist() == whole.slice(row, 1).to_pylist()


@pytest.mark.parametrize("name", list(OPTIONS))
def test_columns_are_as_declared(name: str) -> None:
    operator, table = registry.build({name: OPTIONS[name]}), table_for(name)
    out = operator.process(table).table
    assert set(operator.adds) <= set(out.column_names)
    if not operator.changes_text:
        assert out["text"].equals(table["text"])
    with pytest.raises(KeyError, match=f"operator {name} needs column"):
        operator(pa.table({"other": [1]}))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "extract_html"])
def test_plain_string_columns_work_as_well_as_large_ones(name: str) -> None:
    operator, table = registry.build({name: OPTIONS[name]}), table_for(name)
    plain = table.set_column(1, "text", table["text"].cast(pa.string()))
    assert together(operator, plain).drop(["text"]).equals(together(operator, table).drop(["text"]))


def test_operators_run_in_plain_ray_data_as_instances_and_as_classes(ray_cluster: None) -> None:
    import ray

    table = table_for("fix_text")
    dataset = ray.data.from_arrow([table.slice(0, 5), table.slice(5)])
    for name in ("fix_text", "detect_language", "gopher_quality", "redact_pii"):
        dataset = dataset.map_batches(registry.build({name: OPTIONS[name]}), batch_format="pyarrow")
    expected = table
    for name in ("fix_text", "detect_language", "gopher_quality", "redact_pii"):
        expected = registry.build({name: OPTIONS[name]})(expected)
    found = sorted(dataset.take_all(), key=lambda row: row["n"])
    assert [row["n"] for row in found] == expected["n"].to_pylist()
    assert [row["text"] for row in found] == expected["text"].to_pylist()

    classes = ray.data.from_arrow(table).map_batches(
        registry.load("detect_language"), fn_constructor_kwargs={"keep": ["zh"]}, batch_format="pyarrow", concurrency=1
    )
    assert {row["lang"] for row in classes.take_all()} == {"zh"}
