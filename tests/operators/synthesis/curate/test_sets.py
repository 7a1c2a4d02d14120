"""Operators that decide over a whole set, without Ray: keys and decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import registry
from operators.config import SettingsError
from operators.synthesis.curate.openings import _cap, opening
from operators.synthesis.curate.set_operator import Keys, Removed, SetOperator, surplus
from tests.operators.synthesis.curate.bench import row, table, talk

Gone = dict[str, tuple[str, float, str | None]]


def resolve(entry: Any, rows: list[dict[str, Any]], batch: int = 1000, seed: int = 17) -> tuple[Gone, Removed]:
    """What goes, by id: (reason, value, detail)."""
    operator = registry.build(entry)
    assert isinstance(operator, SetOperator)
    whole = table(rows)
    keyed = pa.table({"id": whole["id"], **operator.keys(whole)})

    def read() -> Iterator[Keys]:
        for start in range(0, len(rows), batch):
            some = keyed.slice(start, batch)
            yield Keys(np.arange(start, start + some.num_rows, dtype=np.uint64), some)

    removed = operator.resolve(read, seed)
    assert (np.diff(removed.ordinals.astype(np.int64)) > 0).all(), "ordinals ascend"
    told = zip(removed.reasons.to_pylist(), removed.values.to_pylist(), removed.details.to_pylist(), strict=True)
    ids = whole["id"].to_pylist()
    return {ids[int(number)]: item for number, item in zip(removed.ordinals, told, strict=True)}, removed


def asked(count: int, reply: str = "Fine.", word: str = "thing") -> list[dict[str, Any]]:
    return [row(f"Tell me of {word} number {n}.", reply, identity=f"{word}{n}") for n in range(count)]


def test_refusals_are_kept_up_to_a_share_of_what_is_kept_and_ignorance_always() -> None:
    rows = asked(90) + asked(30, "I'm sorry, but I can't help with that.", "crime") + asked(10, "我不知道。", "星星")
    gone, removed = resolve({"refusal_share": {"max_share": 0.1}}, rows)
    assert set(gone) <= {f"crime{n}" for n in range(30)}
    left = 30 - len(gone)
    assert left / (100 + left) <= 0.1 < (left + 1) / (101 + left)
    assert removed.stats == {"refusals": 30, "unknown": 10, "refusals_kept": left}
    assert set(gone.values()) == {("refusal", round(30 / 130, 6), None)}
    assert resolve({"refusal_share": {"max_share": 0.1}}, rows, batch=7)[0] == gone
    assert set(resolve({"refusal_share": {"max_share": 0.1}}, rows, seed=18)[0]) != set(gone)
    assert len(resolve({"refusal_share": {"max_share": 0}}, rows)[0]) == 30
    assert resolve("refusal_share", asked(5))[0] == {}


def test_one_prompt_with_different_answers_contradicts_itself() -> None:
    rows = [
        row("Is a whale a fish?", "No.", identity="a"),
        row("is a whale a fish? ", "no.", identity="a2"),
        row("鲸是鱼吗？", "不是。", identity="b"),
        row("鲸是鱼吗？", "是。", identity="c"),
        row("Write a poem.", "The sea is wide and I am here to see it all the way beyond the pier.", identity="d"),
        row("Write a poem.", "A hill, a house, a bell that rings, and nothing more of other things.", identity="e"),
        talk(("user", "Is a whale a fish?"), ("assistant", "No."), ("user", "Why?"), ("assistant", "Milk."), identity="f"),
        talk(("user", "Is a whale a fish?"), identity="g"),
    ]
    gone, removed = resolve("contradictions", rows, batch=3)
    assert gone == {
        "a2": ("duplicate", 1.0, "a"),
        "b": ("contradiction", 2.0, "b"),
        "c": ("contradiction", 2.0, "b"),
        "d": ("contradiction", 2.0, "d"),
        "e": ("contradiction", 2.0, "d"),
    }
    assert removed.stats == {"prompts": 4, "prompts_with_several_answers": 2}
    assert set(resolve({"contradictions": {"keep": "first"}}, rows)[0]) == {"a2", "c", "e"}
    assert set(resolve({"contradictions": {"keep": "short"}}, rows)[0]) == {"a2", "b", "c", "e"}


def test_near_repeats_by_rouge_go_and_name_the_row_that_stays() -> None:
    rows = [
        row("Name three rivers in the north of Spain.", "Ebro, Minho, Sil.", identity="a"),
        row("Please name three rivers in the north of Spain!", "Ebro, Minho, Sil.", identity="b"),
        row("Explain why bread rises.", "Yeast makes gas.", identity="c"),
        row("说出西班牙北部的三条河流。", "埃布罗河。", identity="d"),
        row("请说出西班牙北部的三条河流。", "埃布罗河。", identity="e"),
        row("解释面包为什么会发酵。", "酵母产生气体。", identity="f"),
    ]
    gone, _ = resolve({"near_repeats": {"by": "rouge_l"}}, rows, batch=2)
    assert {name: (item[0], item[2]) for name, item in gone.items()} == {"b": ("near_repeat", "a"), "e": ("near_repeat", "d")}
    assert all(0.7 <= item[1] < 1 for item in gone.values())
    assert resolve({"near_repeats": {"by": "rouge_l"}}, rows)[0] == gone
    assert resolve({"near_repeats": {"by": "rouge_l", "threshold": 0.97}}, rows)[0] == {}


def test_an_instruction_with_other_inputs_repeats_itself_only_when_asked() -> None:
    rows = [row("Classify the sentiment.", "good", given="I love the long summer evenings here.", identity="a")]
    rows.append(row("Classify the sentiment.", "bad", given="The train was late and cold again.", identity="b"))
    assert resolve({"near_repeats": {"by": "rouge_l"}}, rows)[0] == {}
    assert set(resolve({"near_repeats": {"by": "rouge_l", "of": "instruction"}}, rows)[0]) == {"b"}


def test_short_replies_are_alike_without_being_repeats() -> None:
    long = "Yeast eats the sugar of the flour and makes gas, and the gas lifts the dough until the heat of the oven sets it."
    rows = [
        row("a?", "Yes.", identity="a"),
        row("b?", "Yes.", identity="b"),
        row("c?", long, identity="c"),
        row("d?", long + " So.", identity="d"),
    ]
    assert set(resolve({"reply_repeats": {"by": "rouge_l"}}, rows)[0]) == {"d"}


OPENINGS = [
    ("Write a short story about a dragon.", "write story"),
    ("Can you please write me a story?", "write story"),
    ("List three renewable energy sources that are cheap.", "list source"),
    ("Generate a list of ten fruits.", "generate list"),
    ("For the given sentence, identify the subject.", "identify subject"),
    ("What is the capital of Peru?", "what capital"),
    ("Describe the process of making cheese.", "describe process"),
    ("Explain machine learning to a child.", "explain learning"),
    ("写一篇关于春天的文章。", "写 文章"),
    ("请帮我列出三种可再生能源。", "列出 再生能源"),
    ("给出两个浏览器的例子。", "给出 例子"),
    ("将下面的句子翻译成英文。", "翻译 英文"),
    ("设计一个算法来对列表进行排序。", "设计 算法"),
    ("对给定的句子进行情感分析。", "进行 分析"),
    ("什么是贸易逆差？", "什么 贸易逆差"),
    ("...", None),
]


@pytest.mark.parametrize(("text", "expected"), OPENINGS)
def test_the_opening_is_the_verb_and_its_object(text: str, expected: str | None) -> None:
    assert opening(text) == expected


def test_one_opening_has_at_most_its_share_of_what_is_kept() -> None:
    rows = [row(f"Write a story about animal {n}.", "x", identity=f"s{n}") for n in range(60)]
    verbs = ["paint", "count", "sing", "carve", "bake", "sew", "plant", "fold", "mend", "sort"]
    rows += [
        row(f"{verb.title()} a {noun}.", "x", identity=f"{verb}{noun}")
        for verb in verbs
        for noun in ("wall", "song", "cake", "tree")
    ]
    gone, removed = resolve({"opening_diversity": {"max_share": 0.2, "at_least": 2}}, rows, batch=9)
    assert {item[2] for item in gone.values()} == {"write story"}
    left = 60 - len(gone)
    assert left / (40 + left) <= 0.2 < (left + 1) / (41 + left)
    assert removed.stats["cap"] == left == 10
    assert removed.stats["openings"] == 41
    assert removed.stats["most_frequent"]["write story"] == 60
    assert next(iter(gone.values()))[1] == 0.6
    assert set(resolve({"opening_diversity": {"max_share": 0.2, "at_least": 2}}, rows)[0]) == set(gone)
    assert len(resolve({"opening_diversity": {"max_share": 0.01, "at_least": 25}}, rows)[0]) == 35


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 30), st.sampled_from([0.01, 0.05, 0.2, 0.34, 0.5, 1.0])
)
def test_the_cap_is_the_largest_that_keeps_the_share(counts: list[int], others: int, share: float) -> None:
    def fits(cap: int) -> bool:
        kept = sum(min(count, cap) for count in counts) + others
        return cap <= share * kept + 1e-9

    most = max(counts)
    expected = max((cap for cap in range(most + 1) if fits(cap)), default=0)
    assert _cap(np.array(counts), others, share) == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 10))
def test_the_surplus_leaves_the_lowest_draws(drawn: list[int], keep: int) -> None:
    draw = np.array(drawn, np.uint64)
    rows = np.arange(len(drawn))[::2]
    gone = set(surplus(rows, draw, keep).tolist())
    ranked = sorted(rows.tolist(), key=lambda at: (drawn[at], at))
    assert gone == set(ranked[keep:])


def test_a_set_operator_refuses_to_judge_a_batch_alone() -> None:
    with pytest.raises(SettingsError, match="kind `curate`"):
        registry.build("refusal_share").process(table(asked(2)))
    with pytest.raises(SettingsError, match="model"):
        registry.build({"near_repeats": {"by": "embeddings"}})


def test_openings_of_real_sets_are_varied_and_mostly_known(data_pack: Any) -> None:
    import json

    for name, least in (("alpaca_en", 600), ("alpaca_zh", 600)):
        lines = (data_pack / "instruct" / f"{name}.jsonl").read_text("utf-8").splitlines()[:1500]
        found = Counter(opening(json.loads(line)["instruction"]) for line in lines)
        assert found[None] <= 2
        assert len(found) >= least
        assert found.most_common(1)[0][1] < 0.05 * len(lines)
