"""Chinese text in one form: width, spaces, punctuation, script; and code points there and back."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.chain import Chain
from operators.config import SettingsError
from operators.text import points
from operators.text.analysis import text_buffers
from operators.text.chinese import NormaliseChinese, normalise


def one(text: str, lang: str = "zh", **options: object) -> str:
    table = pa.table({"text": [text], "lang": [lang]})
    return str(NormaliseChinese(**options).process(table).table["text"][0].as_py())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ＡＢＣ１２３％＋＝，你好", "ABC123%+=，你好"),
        ("\u3000\u3000第一段\u3000第二段\n \u3000第三段", "第一段 第二段\n 第三段"),
        ("⼀⼆⼈口", "一二人口"),
        ("我 们 今 天 去 公 园 玩 。\n张三 李四 王五", "我们今天去公园玩。\n张三 李四 王五"),
        ("床前明月光 疑是地上霜 举头望明月", "床前明月光 疑是地上霜 举头望明月"),
        ("你好,世界!这是3.14,对吗?", "你好，世界！这是3.14,对吗？"),
        ("用Python(一种语言)写的.", "用Python（一种语言）写的。"),
        ("高级, 然后点击;好", "高级，然后点击；好"),
        ("见 (图一) 和(b).", "见（图一）和(b)."),
        ("对齐 (文字) 这样", "对齐（文字）这样"),
        ("时间:12:30,网址:http://a.cn", "时间:12:30,网址:http://a.cn"),
        ("你好。\nhello，world：fine！", "你好。\nhello,world:fine!"),
        ("等等...好的......", "等等……好的……"),
        ("第1.2节 f(x) = 3, y", "第1.2节 f(x) = 3, y"),
        ("“他说”", "“他说”"),
    ],
)
def test_rules_of_the_default(text: str, expected: str) -> None:
    assert one(text) == expected


def test_each_rule_can_be_left_out() -> None:
    text = "Ａ，我 们 今 天 好 吗?软件里的鼠标"
    assert one(text, width=False, spaces="keep", punctuation="keep") == text
    assert one("你好，（世界）“好”。", punctuation="ascii") == '你好,(世界)"好".'
    assert one("张三 李四", spaces="all") == "张三李四"
    assert one("软件里的鼠标", convert="s2twp") == "軟體裡的滑鼠"
    assert one("漢字轉換，頭髮發展", convert="t2s") == "汉字转换，头发发展"
    with pytest.raises(SettingsError, match="did you mean 't2s'"):
        NormaliseChinese(convert="t2ss")


def test_only_chinese_documents_change() -> None:
    texts = ["漢字,轉換ＡＢＣ", "日本語の漢字,轉換ＡＢＣをかくのである", "English, full width Ａ", "漢字,轉換", None, ""]
    table = pa.table({"text": texts, "lang": ["zh-Hant", "ja", "en", None, "zh", None]})
    verdict = NormaliseChinese(convert="t2s").process(table)
    assert verdict.table["text"].to_pylist() == ["汉字，转换ABC", texts[1], texts[2], "汉字，转换", "", ""]
    assert verdict.counts == {"changed": 2}
    result = Chain(["normalise_chinese"]).run(table.drop_columns(["lang"]))
    assert result.kept["text"].to_pylist()[1] == texts[1], "kana tell Japanese apart where no language is known"
    assert result.funnel["00:normalise_chinese"]["counts"] == {"changed": 2}


TEXT = st.text(st.sampled_from("我们，。,.!?:;()（）：！… \u3000\nab1/“𠀀é\u0301\x00-"), max_size=40)


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT, max_size=4))
def test_normalising_depends_on_no_other_row_and_keeps_all_but_marks_and_spaces(texts: list[str]) -> None:
    array = pa.array(texts, pa.large_string())
    for spaces in (0, 1, 2):
        for marks in (0, 1, 2):
            whole = normalise(array, True, spaces, marks).to_pylist()
            assert whole == [normalise(pa.array([text], pa.large_string()), True, spaces, marks)[0].as_py() for text in texts]
            for before, after in zip(texts, whole, strict=True):
                assert re.sub(r"[^\w\n/\x00\u0301-]", "", before) == re.sub(r"[^\w\n/\x00\u0301-]", "", after)


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_gaps_go_as_a_plain_search_finds_them(text: str) -> None:
    wide = "[我们𠀀，。（）：！？；…]"
    expected = re.sub(rf"(?<={wide})[ \u3000]+(?={wide})", "", text)
    assert normalise(pa.array([text], pa.large_string()), False, 2, 0)[0].as_py() == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=5))
def test_code_points_there_and_back(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    array = pa.array(["left out", *texts], pa.large_string()).slice(1)
    found, bounds = points.decode(*text_buffers(array))
    assert [found[a:b].tolist() for a, b in itertools.pairwise(bounds)] == [[ord(c) for c in text] for text in texts]
    data, offsets = points.encode(found, bounds)
    assert bytes(data) == "".join(texts).encode()
    assert np.diff(offsets).tolist() == [len(text.encode()) for text in texts]
