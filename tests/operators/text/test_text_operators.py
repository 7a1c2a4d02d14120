"""Repair, boilerplate, language, personal data: what each does to a text, in English and in Chinese."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from operators.config import SettingsError
from operators.operator import Operator
from operators.text.boilerplate import StripBoilerplate
from operators.text.language import DetectLanguage
from operators.text.pii import RedactPii
from operators.text.repair import FixText

ENGLISH = "The committee met on Tuesday to discuss the new library, and most of its members agreed with the plan."
CHINESE = "今天下午，委员会讨论了新图书馆的建设方案，大多数成员都同意这个计划，并决定明年开始施工。"


def apply(operator: Operator, *texts: str | None, **columns: list[str]) -> tuple[list[str], list[str | None]]:
    verdict = operator.process(pa.table({"text": pa.array(texts, pa.large_string()), **columns}))
    reasons = verdict.reason.to_pylist() if verdict.reason is not None else [None] * len(texts)
    return verdict.table["text"].to_pylist(), reasons


@pytest.mark.parametrize(
    ("broken", "fixed"),
    [
        ("FranÃ§ois doesnâ€™t", "François doesn’t"),
        ("An Ã©clair\nÂ© in English stays\nplain é", "An éclair\n© in English stays\nplain é"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("zero\u200bwidth\ufeff and soft\u00adhyphen", "zerowidth and softhyphen"),
        ("bell\x07 nul\x00 c1\x9f", "bell nul c1"),
        ("no\u00a0break", "no break"),
        ("Cafe\u0301", "Café"),
        ("全角，标点！（不变）\u3000空格：１２３", "全角，标点！（不变）\u3000空格：１２３"),
        ("a   \n\n\n\n\nb", "a\n\n\nb"),
    ],
)
def test_fix_text_repairs(broken: str, fixed: str) -> None:
    (text,), (reason,) = apply(FixText(), broken)
    assert (text, reason) == (fixed, None)


@pytest.mark.parametrize("original", ["中文语言今天天气", "中文语言学习"])
def test_fix_text_undoes_utf8_that_was_read_as_gbk(original: str) -> None:
    garbled = original.encode().decode("gb18030")
    assert apply(FixText(), f"{CHINESE}\n{garbled}")[0] == [f"{CHINESE}\n{original}"]
    assert apply(FixText(mojibake=False), garbled)[0] == [garbled]


def test_fix_text_rejects_what_is_empty_or_lost() -> None:
    _, reasons = apply(FixText(), "", " \x00\u200b ", None, "\ufffd\ufffd\ufffd abc", CHINESE)
    assert reasons == ["empty", "empty", "empty", "broken", None]


def test_fix_text_can_leave_everything_alone() -> None:
    untouched = "FranÃ§ois\r\n\x07\u200bCafe\u0301 \n\n\n\n x"
    off = FixText(mojibake=False, form="none", line_ends=False, controls=False, zero_width=False, spaces=False, blank_lines=None)
    assert apply(off, untouched)[0] == [untouched]


def test_boilerplate_lines_go_and_content_stays() -> None:
    english = (
        f"Home | About us | Contact\n-----\n{ENGLISH}\n-----\n*****\n{ENGLISH}\nWe use cookies to improve your visit.\n© 2024 Acme"
    )
    chinese = f"首页 > 新闻 > 关于我们\n{CHINESE}\n上一页 下一页\n版权所有 © 2024 京ICP备12345678号\n第 1 页 共 3 页"
    texts, reasons = apply(StripBoilerplate(), english, chinese, ENGLISH, CHINESE)
    assert texts == [f"{ENGLISH}\n-----\n{ENGLISH}", CHINESE, ENGLISH, CHINESE]
    assert reasons == [None] * 4


def test_a_document_of_boilerplate_is_rejected_with_its_share() -> None:
    table = pa.table({"text": ["Home | Login | Register\nPrivacy policy\nAll rights reserved", "登录 注册\n返回顶部\n版权所有"]})
    verdict = StripBoilerplate().process(table)
    assert verdict.reason is not None
    assert verdict.value is not None
    assert verdict.reason.to_pylist() == ["boilerplate"] * 2
    assert verdict.value.to_pylist() == [1.0, 1.0]


def test_headings_that_only_look_like_menu_words_stay() -> None:
    text = f"News\n{ENGLISH}\nHelp\n{ENGLISH}"
    assert apply(StripBoilerplate(), text)[0] == [text]


def test_language_is_detected_and_foreign_or_uncertain_text_dropped() -> None:
    table = pa.table({"text": [ENGLISH, CHINESE, "Bonjour tout le monde, je suis très heureux de vous voir ici.", "12345 !!", ""]})
    verdict = DetectLanguage(keep=["en", "zh"]).process(table)
    assert verdict.table["lang"].to_pylist() == ["en", "zh", "fr", "und", "und"]
    assert verdict.reason is not None
    assert verdict.reason.to_pylist() == [None, None, "language", "language", "language"]
    scores = verdict.table["lang_score"].to_pylist()
    assert all(score == pytest.approx(round(score, 4), abs=1e-7) for score in scores)
    strict = DetectLanguage(threshold={"en": 1.0, "*": 0.0}).process(table)
    assert strict.reason is not None
    assert strict.reason.to_pylist()[:3] == ["low_score", None, None]


def test_language_windows_judge_long_texts_like_the_whole() -> None:
    long = "\n".join([ENGLISH] * 400), CHINESE * 400
    table = pa.table({"text": list(long)})
    assert DetectLanguage(window=200, windows=2).process(table).table["lang"].to_pylist() == ["en", "zh"]


def test_language_accuracy_on_labelled_sentences(data_pack: Path) -> None:
    rows = [json.loads(line) for line in (data_pack / "langid" / "sentences.jsonl").open(encoding="utf-8")]
    rows = [row for row in rows if row["lang"] in ("en", "zh-Hans", "zh-Hant", "de", "fr", "ru", "ja", "ko", "ar", "es")]
    found = DetectLanguage(threshold=0.0).process(pa.table({"text": [row["text"] for row in rows]})).table["lang"].to_pylist()
    for lang, least in (("en", 0.95), ("zh-Hans", 0.95), ("zh-Hant", 0.93), ("de", 0.95), ("ja", 0.95), ("ru", 0.95)):
        own = [code == lang[:2] for row, code in zip(rows, found, strict=True) if row["lang"] == lang]
        assert sum(own) / len(own) >= least, lang


def test_a_wrong_model_path_is_named(tmp_path: Path) -> None:
    table = pa.table({"text": [ENGLISH]})
    with pytest.raises(FileNotFoundError, match=r"no fastText model at .*nowhere\.bin"):
        DetectLanguage(model=str(tmp_path / "nowhere.bin")).process(table)
    (tmp_path / "junk.bin").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match="is no fastText model"):
        DetectLanguage(model=str(tmp_path / "junk.bin")).process(table)


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Write to jane.doe+x@mail.example.co.uk.", "Write to <EMAIL>."),
        ("邮箱zhang@163.com，谢谢", "邮箱<EMAIL>，谢谢"),
        ("Call +1 (415) 555-2671 or 415-555-2671", "Call <PHONE> or <PHONE>"),
        ("电话：13800138000、138-0013-8000、+86 13800138000", "电话：<PHONE>、<PHONE>、<PHONE>"),
        ("座机010-62345678", "座机<PHONE>"),
        ("身份证号11010519491231002X", "身份证号<RESIDENT_ID>"),
        ("身份证号110105194912310021", "身份证号110105194912310021"),  # wrong check digit
        ("card 4111 1111 1111 1111", "card <CARD>"),
        ("card 4111 1111 1111 1112", "card 4111 1111 1111 1112"),  # wrong check digit
        ("from 8.8.8.8 to 192.168.0.1", "from <IP> to 192.168.0.1"),
        ("at 2001:4860:4860::8888", "at <IP>"),
        ("version 1.2.3.4.5 at 12:30:45 on 2024-01-02", "version 1.2.3.4.5 at 12:30:45 on 2024-01-02"),
        ("a@b, @handle, 3.14159265358979", "a@b, @handle, 3.14159265358979"),
        ("order 1234567890123 of 20240102", "order 1234567890123 of 20240102"),
    ],
)
def test_personal_data_becomes_placeholders(text: str, redacted: str) -> None:
    assert apply(RedactPii(), text)[0] == [redacted]


def test_personal_data_is_counted_by_kind_and_can_reject() -> None:
    table = pa.table({"text": ["a@b.com c@d.org 114.114.114.114", "nothing"]})
    verdict = RedactPii(kinds=["email", "ip"], max_count=2, placeholders={"email": "[mail]"}).process(table)
    assert verdict.table["pii_email"].to_pylist() == [2, 0]
    assert verdict.table["pii_ip"].to_pylist() == [1, 0]
    assert verdict.table["text"].to_pylist()[0] == "[mail] [mail] <IP>"
    assert verdict.reason is not None
    assert verdict.reason.to_pylist() == ["pii", None]
    private = RedactPii(public_ips_only=False)
    assert apply(private, "192.168.0.1")[0] == ["<IP>"]


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean 'windows'"):
        DetectLanguage(windws=2)


@pytest.mark.parametrize("operator", [FixText(), StripBoilerplate(), DetectLanguage(), RedactPii()])
def test_operators_pickle_after_use(operator: Operator) -> None:
    table = pa.table({"text": [ENGLISH, CHINESE]})
    before = operator.process(table).table
    again = pickle.loads(pickle.dumps(operator))  # noqa: S301 (our own bytes)
    assert again.process(table).table.equals(before)
