"""Scripts of Chinese, shares of mixed documents, thresholds by language."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import shards
from operators.chain import Chain
from operators.stage import StageContext
from operators.text import chinese_script
from operators.text.chinese_script import ChineseScript
from operators.text.language import DetectLanguage
from operators.text.language_share import LanguageShare
from pipelines.stages.corpus import CorpusStage

ENGLISH = (
    "The committee met on Tuesday to discuss the new library, and most of its members agreed with the plan for the building. "
    "They asked the architect to change the entrance, which many people thought was too narrow for the visitors.\n"
)
GERMAN = (
    "Der Ausschuss trat am Dienstag zusammen, um über die neue Bibliothek zu sprechen, und die meisten Mitglieder stimmten dem "
    "Plan für das Gebäude zu. Sie baten den Architekten, den Eingang zu ändern, der vielen zu schmal erschien.\n"
)
SIMPLIFIED = "今天下午，委员会讨论了新图书馆的建设方案，大多数成员都同意这个计划，并决定明年春天开始施工。\n"
TRADITIONAL = "今天下午，委員會討論了新圖書館的建設方案，大多數成員都同意這個計劃，並決定明年春天開始施工。\n"
CLASSICAL = "學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？人不知而不慍，不亦君子乎？\n"


def table(texts: list[str | None], langs: list[str | None] | None = None) -> pa.Table:
    columns = {"id": [str(i) for i in range(len(texts))], "text": pa.array(texts, pa.large_string()), "source": ["t"] * len(texts)}
    return pa.table(columns | ({"lang": pa.array(langs, pa.string())} if langs is not None else {}))


def test_simplified_and_traditional_chinese_are_told_apart_and_others_are_left_alone() -> None:
    rows = table([SIMPLIFIED, TRADITIONAL, "中文", ENGLISH, "これは学校です。", None, SIMPLIFIED * 3 + TRADITIONAL])
    found = ChineseScript(codes=True).process(rows).table
    assert found["script"].to_pylist() == ["Hans", "Hant", None, None, None, None, "Hans"]
    assert found["script_share"].to_pylist()[:2] == [1.0, 1.0]
    assert 0.5 < found["script_share"].to_pylist()[6] < 0.9
    assert found["lang"].to_pylist() == ["zh-Hans", "zh-Hant", None, None, None, None, "zh-Hans"]


def test_a_script_a_pure_one_or_modern_chinese_can_be_asked_for() -> None:
    rows = table([SIMPLIFIED, TRADITIONAL, ENGLISH, SIMPLIFIED * 2 + TRADITIONAL, CLASSICAL])
    keeps = ChineseScript(keep=["Hans"], min_share=0.9).process(rows)
    assert keeps.reason is not None and keeps.value is not None
    assert keeps.reason.to_pylist() == [None, "script", None, "mixed_script", "script"]
    assert 0.5 < keeps.value.to_pylist()[3] < 0.9
    modern = ChineseScript(min_modern_particles=0.005).process(rows)
    assert modern.reason is not None and modern.value is not None
    assert modern.reason.to_pylist() == [None, None, None, None, "classical"]
    assert modern.value.to_pylist()[4] == 0


def test_the_written_code_goes_before_a_guess_and_filters_still_know_it_as_chinese() -> None:
    quality = {"gopher_quality": {"thresholds": {"zh": {"min_words": 10}}}}
    chain = Chain([{"detect_language": {"keep": ["zh"]}}, {"chinese_script": {"codes": True}}, quality, "fineweb_quality"])
    kept = chain.run(table([SIMPLIFIED, TRADITIONAL, ENGLISH])).kept
    assert kept["lang"].to_pylist() == ["zh-Hans", "zh-Hant"]
    assert ChineseScript().process(table([SIMPLIFIED], ["en"])).table["script"].to_pylist() == [None]


def test_counts_of_telling_characters_equal_a_plain_count() -> None:
    bits, first = chinese_script._table(), chinese_script._FIRST

    @settings(max_examples=80, deadline=None)
    @given(
        st.text(st.one_of(st.sampled_from("后里发發图圖的了a\U00020000é"), st.characters(exclude_categories=["Cs"])), max_size=30)
    )
    def check(text: str) -> None:
        codes = [int(bits[ord(c) - first]) if first <= ord(c) < first + len(bits) else 0 for c in text]
        simplified, traditional = (sum(bool(code & bit) for code in codes) for bit in (1, 2))
        scores = ChineseScript().measure(table([text], ["zh"]))
        share = None if simplified + traditional == 0 else round(max(simplified, traditional) / (simplified + traditional), 6)
        assert scores["script_share"][0].as_py() == share
        wanted = None if simplified == traditional else "Hans" if simplified > traditional else "Hant"
        assert scores["script"][0].as_py() == wanted

    check()


def test_sentences_in_both_scripts_are_told_apart(data_pack: Path) -> None:
    lines = (data_pack / "langid" / "sentences.jsonl").read_text("utf-8").split("\n")
    rows = [row for row in map(json.loads, filter(None, lines)) if row["lang"].startswith("zh-")]
    found = ChineseScript(codes=True).process(table([row["text"] for row in rows], ["zh"] * len(rows))).table["lang"].to_pylist()
    assert np.mean([code == row["lang"] for code, row in zip(found, rows, strict=True)]) >= 0.99


def test_shares_of_a_mixed_document_add_up_and_decide() -> None:
    rows = table([ENGLISH * 9 + SIMPLIFIED * 9, ENGLISH * 6, GERMAN * 6 + ENGLISH * 2, "", "12345 !!!", None])
    operator = LanguageShare(languages=["en", "zh"], minimum=0.9)
    verdict = operator.process(rows)
    shares = [{item["lang"]: item["share"] for item in row} for row in verdict.table["lang_shares"].to_pylist()]
    size = [len("".join(piece.split())) * 9 for piece in (ENGLISH, SIMPLIFIED)]
    assert shares[0]["en"] == pytest.approx(size[0] / sum(size), abs=0.08)
    assert shares[0]["zh"] == pytest.approx(size[1] / sum(size), abs=0.08)
    assert shares[1] == {"en": 1.0}
    assert shares[2]["de"] == pytest.approx(0.75, abs=0.08)
    assert shares[3:] == [{}, {"und": 1.0}, {}]
    assert all(sum(row.values()) == pytest.approx(1, abs=1e-3) for row in shares if row)
    assert verdict.reason is not None and verdict.value is not None
    assert verdict.reason.to_pylist() == [None, None, "too_little", "too_little", "too_little", "too_little"]
    assert verdict.value.to_pylist()[2] == pytest.approx(0.25, abs=0.08)
    most = LanguageShare(maximum={"en": 0.5, "und": 0.1}).process(rows)
    assert most.reason is not None
    assert most.reason.to_pylist() == ["too_much", "too_much", None, None, "too_much", None]


def test_shares_do_not_depend_on_the_batch_and_replay_from_scores() -> None:
    texts = [ENGLISH * 3 + GERMAN * 3, "", SIMPLIFIED * 5 + ENGLISH, "x"]
    together = LanguageShare().measure(table(texts))
    for row, text in enumerate(texts):
        assert LanguageShare().measure(table([text]))["lang_shares"].to_pylist() == [together["lang_shares"][row].as_py()]
    replayed = LanguageShare(languages=["zh"], minimum=0.5).decide(pa.table({"x": texts}), together)
    assert replayed[0].to_pylist() == ["too_little", "too_little", None, "too_little"]
    assert LanguageShare(languages=["zh"]).measured_as() == LanguageShare(maximum={"en": 0.1}).measured_as()
    assert LanguageShare().measure(table([]))["lang_shares"].to_pylist() == []


def test_a_threshold_by_language_holds_for_that_language_alone() -> None:
    rows = table([ENGLISH, SIMPLIFIED])
    scores = DetectLanguage().measure(rows)
    for threshold, reasons in (
        ({"zh": 1.1, "*": 0.1}, [None, "low_score"]),
        ({"en": 1.1}, ["low_score", None]),
        (0.1, [None, None]),
    ):
        reason, _ = DetectLanguage(threshold=threshold).decide(rows, scores)
        assert reason.to_pylist() == reasons, threshold


def test_a_corpus_stage_writes_scripts_and_shares_and_rejects_by_them(tmp_path: Path, ray_cluster: None) -> None:
    texts = [ENGLISH, SIMPLIFIED, TRADITIONAL, ENGLISH + SIMPLIFIED * 30, SIMPLIFIED + ENGLISH * 20]
    lines = "".join(json.dumps({"id": str(i), "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(texts))
    (tmp_path / "in.jsonl").write_text(lines, "utf-8")
    operators = [
        {"detect_language": {"keep": ["en", "zh"], "threshold": {"zh": 0.3, "*": 0.3}}},
        {"chinese_script": {"codes": True, "keep": ["Hans"]}},
        {"language_share": {"maximum": {"en": 0.6}}},
    ]
    stage = CorpusStage.model_validate(
        {"kind": "corpus", "read": {"path": str(tmp_path / "in.jsonl")}, "operators": operators, "measure": "seen"}
    )
    directory = str(tmp_path / "run" / "corpus" / "f")
    stage.run(StageContext("corpus", "corpus", directory, "f", {}, {}, 0, workers=1, base_directory=str(tmp_path)))
    manifest = shards.load_manifest(directory)
    kept = pa.concat_tables(
        [pq.read_table(tmp_path / "run" / "corpus" / "f" / part["name"]) for part in manifest.parts]
    ).to_pylist()
    assert [(row["id"], row["lang"], row["script"]) for row in kept] == [("1", "zh-Hans", "Hans"), ("3", "zh-Hans", "Hans")]
    assert {item["lang"] for item in kept[1]["lang_shares"]} == {"zh", "en"}
    assert manifest.ledger.rejected == {"chinese_script:script": 1, "language_share:too_much": 2}
