"""Quality filters: parity with the published rules, thresholds by language, labelled good and bad text."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.config import SettingsError
from operators.filters.badwords import BadWords
from operators.filters.c4 import C4Quality
from operators.filters.fineweb import FineWebQuality
from operators.filters.gopher_quality import CHINESE_STOP_WORDS, GopherQuality
from operators.filters.gopher_repetition import GopherRepetition
from operators.operator import Filter
from operators.text import characters
from operators.text.analysis import Analysis

GOOD_ENGLISH = (
    "The committee met on Tuesday to discuss the new library, and most of its members agreed with the plan. They have asked the "
    "architect to change the entrance, which many thought was too narrow for the number of visitors that the town expects. "
    "Work will begin in the spring. The mayor said that the building would be open to everyone within two years, and that the "
    "old library should become a museum. Several residents wrote letters to thank the council for its patience."
)
GOOD_CHINESE = (
    "今天下午，委员会讨论了新图书馆的建设方案，大多数成员都同意这个计划，并决定明年春天开始施工。他们请建筑师修改入口的设计，"
    "因为很多人认为原来的入口太窄，不能满足来访者的需要。市长表示，这座建筑将在两年内对所有人开放，旧的图书馆应该成为一座博物馆。"
    "几位居民写信感谢市政府的耐心，也提出了一些有用的建议。大家希望新的图书馆能够成为孩子们学习和交流的地方。"
)
GOOD_TRADITIONAL = (
    "今天下午，委員會討論了新圖書館的建設方案，大多數成員都同意這個計劃，並決定明年春天開始施工。他們請建築師修改入口的設計，"
    "因為很多人認為原來的入口太窄，不能滿足來訪者的需要。市長表示，這座建築將在兩年內對所有人開放，舊的圖書館應該成為一座博物館。"
)
BAD = {
    "symbols": "### $$$ %%% &&& *** " * 30,
    "short": "Too short.",
    "menu": "- Home\n- About\n- Contact\n- Login\n" * 20,
    "中文短": "太短了。",
    "中文重复": "点击这里购买便宜的商品，全场包邮。" * 30,
    "中文列表": "价格：100元\n型号：A1\n" * 40,
    "数字": "123 456 789 -- 000 111 " * 30,
}
_LETTERS = st.one_of(st.sampled_from("ab .#-•…\n\r\u2028'\"{中文。的是, 1"), st.characters(exclude_categories=["Cs"]))
_REPETITIVE = ["a b c d e f g " * 6, "的 是 中文\n\n的 是 中文\n\n", "x\n" * 9]
TEXTS = st.one_of(st.text(_LETTERS, max_size=80), st.sampled_from(_REPETITIVE))
ENDS = tuple(chr(point) for point in range(characters.TABLE_SIZE) if characters.table()[point] & characters.TERMINAL)


def words_of(text: str) -> list[str]:
    found = Analysis.of(pa.array([text], pa.large_string()))
    return [found.data[s : s + n].tobytes().decode() for s, n in zip(found.words.start, found.words.length, strict=True)]


def symbol(character: str) -> bool:
    return ord(character) < characters.TABLE_SIZE and bool(characters.table()[ord(character)] & characters.SYMBOL)


def naive_quality(text: str) -> dict[str, float]:
    """Gopher's measures as datatrove computes them."""
    words, lines = words_of(text), text.splitlines()
    real = [word for word in words if not all(map(symbol, word))]
    return {
        "words": len(real),
        "mean_word_length": float(np.mean([len(word) for word in real])) if real else np.nan,
        "hash_ratio": text.count("#") / len(words) if words else np.nan,
        "ellipsis_ratio": (text.count("...") + text.count("…")) / len(words) if words else np.nan,
        "bullet_lines": sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) if lines else np.nan,
        "ellipsis_lines": sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) if lines else np.nan,
        "alpha_words": sum(any(c.isalpha() for c in word) for word in words) / len(words) if words else np.nan,
        "stop_words_en": len({"the", "be", "to", "of", "and", "that", "have", "with"} & set(words)),
        "stop_words_zh": len(set(CHINESE_STOP_WORDS) & set(words)),
    }


def naive_repetition(text: str) -> dict[str, float]:
    """Gopher's repetition measures as datatrove computes them."""

    def duplicates(items: list[str]) -> tuple[int, int]:
        seen: set[str] = set()
        found = [item for item in items if item in seen or seen.add(item)]  # type: ignore[func-returns-value]
        return len(found), sum(map(len, found))

    size = max(len(text), 1)
    paragraphs, lines, words = re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text), words_of(text)
    out = {
        "duplicate_paragraphs": duplicates(paragraphs)[0] / len(paragraphs),
        "duplicate_paragraph_characters": duplicates(paragraphs)[1] / size,
        "duplicate_lines": duplicates(lines)[0] / len(lines),
        "duplicate_line_characters": duplicates(lines)[1] / size,
    }
    for n in (2, 3, 4):
        grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        gram, count = Counter(grams).most_common(1)[0] if grams else ("", 0)
        out[f"top_{n}_gram"] = len(gram) * count / size
    for n in range(5, 11):
        seen: set[str] = set()
        repeated = i = 0
        while i < len(words) - n + 1:
            gram = "".join(words[i : i + n])
            if gram in seen:
                repeated += len(gram)
                i += n
            else:
                seen.add(gram)
                i += 1
        out[f"duplicate_{n}_grams"] = repeated / size
    return out


def naive_fineweb(text: str) -> dict[str, float]:
    lines = [line for line in text.split("\n") if line.strip()]
    repeated = sum(len(line) for i, line in enumerate(lines) if line in lines[:i])
    words = words_of(text)
    return {
        "empty": float(not lines),
        "line_punctuation": sum(line.endswith(ENDS) for line in lines) / len(lines) if lines else np.nan,
        "short_lines": sum(len(line) <= 30 for line in lines) / len(lines) if lines else np.nan,
        "duplicate_characters": repeated / len(text.replace("\n", "")) if text.replace("\n", "") else np.nan,
        "line_feeds": text.count("\n") / len(words) if words else np.nan,
    }


@pytest.mark.parametrize(
    ("operator", "naive"),
    [(GopherQuality(), naive_quality), (GopherRepetition(), naive_repetition), (FineWebQuality(), naive_fineweb)],
)
def test_measures_equal_a_naive_implementation_of_the_rules(operator: Filter, naive: object) -> None:
    table = characters.table()  # built once, outside the examples
    assert table[0x4E00] & characters.HAN

    @settings(max_examples=120, deadline=None)
    @given(st.lists(TEXTS, max_size=3))
    def check(texts: list[str]) -> None:
        scores = operator.measure(pa.table({"text": pa.array(texts, pa.large_string())}))
        for row, text in enumerate(texts):
            for key, value in naive(text).items():  # type: ignore[operator]
                assert scores[key][row].as_py() == pytest.approx(value, nan_ok=True, abs=0), (key, text)

    check()


@pytest.mark.parametrize(
    "operator", [GopherQuality(), GopherRepetition(), FineWebQuality(), C4Quality(min_sentences=3), BadWords()]
)
def test_good_documents_pass_in_both_languages_and_scripts(operator: Filter) -> None:
    table = pa.table({"text": [GOOD_ENGLISH, GOOD_CHINESE, GOOD_TRADITIONAL]})
    assert operator.process(table).reason.to_pylist() == [None] * 3  # type: ignore[union-attr]


def test_every_bad_document_fails_some_filter() -> None:
    table = pa.table({"text": list(BAD.values())})
    failed = {name: [] for name in BAD}
    for operator in (GopherQuality(), GopherRepetition(), FineWebQuality()):
        for name, reason in zip(BAD, operator.process(table).reason.to_pylist(), strict=True):  # type: ignore[union-attr]
            failed[name] += [reason] if reason else []
    assert all(failed.values()), failed


def test_no_filter_empties_a_chinese_corpus(data_pack: Path) -> None:
    rows = pq.read_table(data_pack / "corpus" / "zh.parquet", columns=["text", "source"])
    prose = rows.filter(pa.compute.is_in(pa.compute.utf8_slice_codeunits(rows["source"], 0, 4), pa.array(["CMRC", "DRCD"]))).slice(
        0, 400
    )
    for operator in (GopherQuality(), GopherRepetition(), FineWebQuality(), C4Quality(), BadWords()):
        kept = operator.process(prose.select(["text"])).kept().num_rows
        assert kept >= 0.7 * prose.num_rows, operator.name


def test_thresholds_can_be_changed_by_language_and_replayed_without_measuring() -> None:
    table = pa.table({"text": [GOOD_ENGLISH, GOOD_CHINESE], "lang": ["en", "zh"]})
    scores = GopherQuality().measure(table)
    strict = GopherQuality(thresholds={"zh": {"min_words": 100_000}})
    reason, value = strict.decide(table, scores)
    assert reason.to_pylist() == [None, "short"]
    assert value.to_pylist()[1] == scores["words"][1].as_py()
    off = GopherQuality(thresholds={"*": {"min_words": None}})
    assert off.process(pa.table({"text": ["the house and the garden that we have"]})).reason.to_pylist() == [None]  # type: ignore[union-attr]
    own = GopherQuality(thresholds={"en": {"stop_words": ["zebra"], "min_stop_words": 1}})
    assert own.process(table).reason.to_pylist() == ["few_stop_words", None]  # type: ignore[union-attr]
    with pytest.raises(SettingsError, match="did you mean 'min_words'"):
        GopherQuality(thresholds={"en": {"min_word": 3}})


def test_the_detected_language_goes_before_the_guess() -> None:
    table = pa.table({"text": [GOOD_CHINESE] * 3, "lang": pa.array(["zh-Hant", "en", None])})
    reasons = GopherQuality().process(table).reason.to_pylist()  # type: ignore[union-attr]
    assert reasons[0] is None
    assert reasons[1] is not None
    assert reasons[2] is None


def test_empty_and_blank_texts_are_rejected() -> None:
    table = pa.table({"text": pa.array(["", " \n\n ", None], pa.string())})
    assert GopherRepetition().process(table).reason.to_pylist()[::2] == ["empty", "empty"]  # type: ignore[union-attr]
    assert GopherQuality().process(table).reason.to_pylist() == ["short"] * 3  # type: ignore[union-attr]
    assert FineWebQuality().process(table).reason.to_pylist() == ["empty"] * 3  # type: ignore[union-attr]
    assert C4Quality().process(table).reason.to_pylist() == ["few_sentences"] * 3  # type: ignore[union-attr]


def test_c4_drops_lines_and_condemns_documents() -> None:
    text = (
        "First sentence is here. Second sentence is here.[1]\nshort line\nPlease enable JavaScript to see it.\n"
        "Read our privacy policy for more.\nThird one here. Fourth one here. Fifth one is here."
    )
    chinese = "第一句话在这里。第二句话在这里。\n短\n请阅读我们的隐私政策以了解更多。\n第三句话。第四句话。第五句话在这里。"
    table = pa.table(
        {"text": [text, chinese, f"{text}\nint main() {{ return 0; }}", f"{text}\nLorem ipsum dolor sit.", "One. Two."]}
    )
    verdict = C4Quality().process(table)
    assert verdict.reason.to_pylist() == [None, None, "curly_bracket", "lorem_ipsum", "few_sentences"]  # type: ignore[union-attr]
    assert verdict.table["text"].to_pylist()[:2] == [
        "First sentence is here. Second sentence is here.\nThird one here. Fourth one here. Fifth one is here.",
        "第一句话在这里。第二句话在这里。\n第三句话。第四句话。第五句话在这里。",
    ]
    both = pa.table({"text": ["some { bracket here\nthen lorem ipsum dolor", "then lorem ipsum dolor\nsome { bracket here"]})
    assert C4Quality().process(both).reason.to_pylist() == ["curly_bracket", "lorem_ipsum"]  # type: ignore[union-attr]
    ended = C4Quality(terminal_punctuation=True, min_sentences=1)
    kept = ended.process(pa.table({"text": ["No mark at the end\nA mark at the end.\nTrailing dots here..."]}))
    assert kept.table["text"].to_pylist() == ["A mark at the end."]


def test_bad_words_are_counted_at_word_boundaries_and_anywhere_in_chinese() -> None:
    table = pa.table(
        {
            "text": [
                "Scunthorpe has a classic grass pass",
                "you ass, ASS! ass",
                GOOD_CHINESE,
                "你他妈的是个傻逼",
                "性能很好，牛奶很香",
            ]
        }
    )
    scores = BadWords().measure(table)
    assert scores["count"].to_pylist()[:3] == [0, 3, 0]
    assert scores["count"].to_pylist()[3] >= 2
    assert scores["count"].to_pylist()[4] == 0
    assert BadWords().process(table).reason.to_pylist() == [None, "bad_words", None, "bad_words", None]  # type: ignore[union-attr]
    assert BadWords(single_characters=True).measure(table)["count"].to_pylist()[4] > 0


@pytest.mark.parametrize(
    ("lang", "bad", "harmless"),
    [
        ("en", "He told them to fuck off.", "He told them to take a duck off the assessment of the cockpit."),
        ("zh", "你这个傻逼快滚", "他的性格很好，喜欢喝牛奶，干活也卖力。"),
        ("zh-Hant", "這個白癡打手槍，雞巴", "他的性格很好，喜歡喝牛奶，幹活也賣力。"),
        ("de", "So eine Scheiße, du Arschloch.", "Der Hase saß im Gras."),
        ("ja", "まんこ", "女の子は学校へ行きました。"),
    ],
)
def test_every_language_has_its_own_bad_words(lang: str, bad: str, harmless: str) -> None:
    rows = pa.table({"text": [bad, harmless], "lang": [lang, lang]})
    counts = BadWords().measure(rows)["count"].to_pylist()
    assert counts[0] >= 1
    assert counts[1] == 0


def test_bad_words_drop_offensive_dialogues_and_hardly_any_clean_document(data_pack: Path) -> None:
    lines = (data_pack / "preference" / "hh_rlhf_harmless.jsonl").read_text("utf-8").split("\n")
    dialogues = [json.loads(line)["rejected"] for line in lines if line]
    clean = pq.read_table(data_pack / "corpus" / "zh.parquet", columns=["text", "source"])
    clean = clean.filter(pa.compute.match_substring_regex(clean["source"], "^(CMRC2018|DRCD)"))["text"].to_pylist()
    for texts, lang, low, high in ((dialogues, "en", 0.1, 0.2), (clean, "zh", 0.0, 0.01)):
        kept = BadWords().process(pa.table({"text": texts, "lang": [lang] * len(texts)})).kept().num_rows
        assert low <= 1 - kept / len(texts) <= high, lang


def test_bad_words_can_be_masked_and_lists_extended(tmp_path: Path) -> None:
    operator = BadWords(action="mask", extra={"en": ["frobnicate"]})
    verdict = operator.process(pa.table({"text": ["We Frobnicate the ass.", "好的他妈的"]}))
    assert verdict.table["text"].to_pylist() == ["We ********** the ***.", "好的***"]
    assert verdict.table["bad_words"].to_pylist() == [2, 1]
    assert operator.changes_text
    assert not BadWords().changes_text
    own = tmp_path / "own.json"
    own.write_text('{"en": ["zebra"]}')
    listed = BadWords(path=str(own), max_count=0).process(pa.table({"text": ["a zebra", "an ass"]}))
    assert listed.reason.to_pylist() == ["bad_words", None]  # type: ignore[union-attr]
    own.write_text("[1, 2]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        BadWords(path=str(own)).process(pa.table({"text": ["x"]}))


@pytest.mark.parametrize("operator", [GopherQuality(), GopherRepetition(), FineWebQuality(), C4Quality(), BadWords(action="mask")])
def test_filters_pickle(operator: Filter) -> None:
    table = pa.table({"text": [GOOD_ENGLISH, GOOD_CHINESE, "ass"]})
    again = pickle.loads(pickle.dumps(operator))  # noqa: S301 (our own bytes)
    assert again.process(table).table.equals(operator.process(table).table)
    assert again.changes_text == operator.changes_text
