"""Chinese text: what the default filters keep of good prose and reject of menus, lists, advertising and garbled text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from operators.chain import Chain
from operators.filters.fineweb import FineWebQuality
from operators.filters.gopher_quality import GopherQuality
from tests.data import make_bad_chinese

CHAIN = [
    {"detect_language": {"keep": ["zh"]}},
    "gopher_repetition",
    "gopher_quality",
    {"c4_quality": {"languages": ["en"]}},
    "fineweb_quality",
]
BAD = Path(__file__).resolve().parents[2] / "data" / "bad_chinese.jsonl"
# modern prose: encyclopaedia articles and books
GOOD = ("CMRC2018", "DRCD", "zh_classical_modern_target")


def table(texts: list[str], ids: list[str]) -> pa.Table:
    return pa.table({"id": ids, "text": pa.array(texts, pa.large_string()), "source": pa.array(["test"] * len(ids))})


@pytest.fixture(scope="module")
def bad() -> list[dict[str, str]]:
    return [json.loads(line) for line in BAD.read_text("utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def good(data_pack: Path) -> pa.Table:
    rows = pq.read_table(data_pack / "corpus" / "zh.parquet", columns=["id", "text", "source"])
    return rows.filter(pc.is_in(pc.list_element(pc.split_pattern(rows["source"], " "), 0), pa.array(GOOD)))


def test_nine_tenths_of_bad_chinese_text_is_rejected_and_half_of_each_kind(bad: list[dict[str, str]]) -> None:
    assert len(bad) >= 150
    result = Chain(CHAIN).run(table([row["text"] for row in bad], [row["id"] for row in bad]))
    kept = set(result.kept["id"].to_pylist())
    assert len(kept) <= 0.1 * len(bad)
    kinds, missed = Counter(row["kind"] for row in bad), Counter(row["kind"] for row in bad if row["id"] in kept)
    assert all(missed[kind] <= 0.5 * count for kind, count in kinds.items()), missed


def test_menus_and_lists_of_links_of_news_pages_are_rejected(data_pack: Path) -> None:
    rows = list(make_bad_chinese.from_pages())
    assert len(rows) >= 50
    result = Chain(CHAIN).run(table([row["text"] for row in rows], [str(number) for number in range(len(rows))]))
    assert result.kept.num_rows <= 0.15 * len(rows)  # a list of headlines may read like prose


def test_good_chinese_prose_is_kept(good: pa.Table) -> None:
    result = Chain(CHAIN).run(good)
    sources, kept = (Counter(name.split(" ")[0] for name in rows["source"].to_pylist()) for rows in (good, result.kept))
    assert result.kept.num_rows >= 0.95 * good.num_rows, result.rejected
    for name in GOOD:
        assert kept[name] >= 0.95 * sources[name], name


def test_simplified_traditional_and_classical_chinese_have_the_same_limits() -> None:
    score = {"letter_words": [0.6]}
    for code in ("zh", "zh-Hans", "zh-Hant", "zh_TW", "yue", "lzh", "cmn_Hani"):
        scores = GopherQuality().measure(table(["一个"], ["1"]))
        scores |= {name: pa.array(values) for name, values in score.items()} | {"words": pa.array([100.0])}
        scores["stop_words_zh"] = pa.array([5])
        reason, value = GopherQuality().decide(pa.table({"lang": [code]}), scores)
        assert (reason.to_pylist(), value.to_pylist()) == (["few_letters"], [0.6]), code


def test_a_preset_brings_the_published_limits_and_a_recipe_can_change_either() -> None:
    # three marks and two numbers among eight words: enough letters once marks are no words
    text = (
        "在2010年，他离开了1981年建立的学校，回到北京，开始新的生活，并且写了《回忆》一书，于2011年出版，受到欢迎，后来他又写了三本书。"
        * 2
    )
    rows = table([text], ["1"])
    assert GopherQuality().process(rows).reason.to_pylist() == [None]  # type: ignore[union-attr]
    assert GopherQuality(preset="fineweb2").process(rows).reason.to_pylist() == ["few_letters"]  # type: ignore[union-attr]
    own = GopherQuality(preset="fineweb2", thresholds={"zh": {"min_alpha_words": 0.5}})
    assert own.process(rows).reason.to_pylist() == [None]  # type: ignore[union-attr]
    cut = table(["他说：“我们明天再来。”大家都同意了（除了他的哥哥）"], ["1"])
    assert FineWebQuality().process(cut).reason.to_pylist() == [None]  # type: ignore[union-attr]
    assert FineWebQuality(preset="fineweb2").process(cut).reason.to_pylist() == ["line_punctuation"]  # type: ignore[union-attr]


def test_scores_serve_both_presets() -> None:
    rows = table(["在2010年，他离开了学校。" * 9], ["1"])
    scores = GopherQuality().measure(rows)
    fresh = GopherQuality(preset="fineweb2").measure(rows)
    assert scores.keys() == fresh.keys()
    assert np.isclose(scores["letter_words"][0].as_py(), 1 - 1 / 6, atol=0.1)
    for preset in ("danlu", "fineweb2"):
        replayed = GopherQuality(preset=preset).decide(rows, scores)
        assert replayed[0].equals(GopherQuality(preset=preset).process(rows).reason)
