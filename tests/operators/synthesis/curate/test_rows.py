"""Row-local operators on small labelled examples, written for this project, in English and Chinese."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from operators import registry
from operators.config import SettingsError
from operators.synthesis.curate import patterns
from operators.synthesis.curate.numerals import values
from operators.synthesis.curate.refusals import refuses
from operators.synthesis.curate.stock_phrases import ban_line
from operators.synthesis.curate.turns import REPLIES, Turns, instructions, whole_text
from operators.synthesis.curate.unsupported_numbers import unsupported_values
from operators.synthesis.rows import INSTRUCTIONS, table_of
from tests.operators.synthesis.curate.bench import judge, reasons, row, table, talk

LOCAL = ["vague_reference", "time_sensitive", "malformed_reply", "unsupported_numbers", "stock_phrases", "illegal_keywords"]
LOCAL.append("garbled_reply")

PASSAGE = (
    "The harbour of Lerno was rebuilt after the storm of 1907. It has 14 berths and took in 2,300 ships in its first year, most of "
    "them carrying timber and salted fish from the northern islands."
)
PASSAGE_ZH = (
    "勒诺港在一九零七年的风暴之后重建，共有十四个泊位，第一年接待了二千三百艘船，"
    "其中大多数运送来自北方岛屿的木材和咸鱼。港口的灯塔至今仍在使用。"
)

VAGUE = [
    ("Summarize the passage above in one sentence.", "It is about ships.", True),
    ("What does the author mean by freedom?", "Independence.", True),
    ("Translate this sentence into French.", "Bonjour.", True),
    ("According to the figure below, which region grew most?", "The north.", True),
    ("Rewrite the following paragraph in a formal tone.", "Dear all, ...", True),
    ("List the advantages of this approach mentioned in the text.", "It is fast.", True),
    ("请概括上文的主要内容。", "讲的是港口。", True),
    ("把下面的句子翻译成英文。", "Hello.", True),
    ("根据文章，作者为什么离开家乡？", "为了求学。", True),
    ("如图所示，哪个地区增长最快？", "北方。", True),
    ("这篇文章表达了什么观点？", "要珍惜时间。", True),
    ("Translate this sentence into French: The cat sleeps on the mat.", "Le chat dort.", False),
    ('What does the proverb "a stitch in time saves nine" mean?', "Act early.", False),
    ("Write a function that returns the square root of a given number.", "def f(x): ...", False),
    ("Sort the following list in ascending order [3, 1, 2].", "1, 2, 3", False),
    ("Explain the water cycle to a child.", "Water goes up and comes down.", False),
    ("Describe how a photograph is developed in a darkroom.", "First, ...", False),
    ("把下面的句子翻译成英文：今天我们去爬山。", "We go hiking.", False),
    ("解释“行胜于言”这句话的含义。", "做比说重要。", False),
    ("编写一个函数来计算给定数字的阶乘。", "def f(n): ...", False),
    ("请提供三个保持健康的建议。", "多运动。", False),
    ("写一篇关于春天的短文。", "春天来了。", False),
]


@pytest.mark.parametrize(("question", "reply", "vague"), VAGUE)
def test_a_reference_without_context_is_found_and_one_with_its_material_is_not(question: str, reply: str, vague: bool) -> None:
    assert reasons("vague_reference", [row(question, reply)]) == (["question_without_context"] if vague else [None])


def test_an_input_a_system_message_or_an_earlier_turn_is_context() -> None:
    question = "Summarize the passage above."
    rows = [
        row(question, "It is about ships.", given=PASSAGE),
        talk(("system", PASSAGE * 2), ("user", question), ("assistant", "Ships.")),
        talk(("user", "Tell me of Lerno."), ("assistant", PASSAGE), ("user", question), ("assistant", "Ships.")),
    ]
    assert reasons("vague_reference", rows) == [None, None, None]


def test_a_reply_that_cites_a_text_nobody_gave_is_found() -> None:
    rows = [
        row("Why is the sea salty?", "According to the passage, rivers carry minerals into it."),
        row("海水为什么是咸的？", "文中提到，河流把矿物质带入海洋。"),
        row("Why is the sea salty?", "According to the passage, rivers carry minerals into it.", given=PASSAGE),
        row("Why is the sea salty?", "Rivers carry minerals into it."),
    ]
    assert reasons("vague_reference", rows) == ["reply_without_context", "reply_without_context", None, None]
    assert reasons("vague_reference", rows, replies=False) == [None] * 4
    assert judge("vague_reference", rows).detail.to_pylist()[:2] == ["According to the passage", "文中提到"]


TIMELY = [
    ("What is the weather in Oslo today?", True),
    ("Who is the current president of Brazil?", True),
    ("What are the latest news headlines?", True),
    ("What time is it?", True),
    ("How much does a barrel of oil cost right now?", True),
    ("今天北京的天气怎么样？", True),
    ("美国现任总统是谁？", True),
    ("介绍一下最新的手机型号。", True),
    ("今年的诺贝尔文学奖得主是谁？", True),
    ("现在几点了？", True),
    ("Who was the first president of the United States?", False),
    ("Explain how electric current flows through a wire.", False),
    ("Write a story about a boy who finds a door today.", False),
    ("Translate 'What is the weather today?' into German.", False),
    ("How do clouds form?", False),
    ("美国第一任总统是谁？", False),
    ("写一个关于明天的科幻故事。", False),
    ("找出“今天是星期四”这句话中的专有名词。", False),
    ("当前目录下的文件怎么列出来？", False),
    ("解释电流的方向。", False),
]


@pytest.mark.parametrize(("question", "timely"), TIMELY)
def test_a_question_whose_answer_goes_out_of_date_is_found(question: str, timely: bool) -> None:
    assert reasons("time_sensitive", [row(question, "...")]) == (["time_sensitive"] if timely else [None])


def test_a_tool_may_know_the_day_and_an_input_may_speak_of_it() -> None:
    rows = [
        talk(("user", "What is the weather in Oslo today?"), ("assistant", "Rain."), tools="[]"),
        row("Name the subject of the sentence.", "Weather", given="What is the weather in Oslo today?"),
    ]
    assert reasons("time_sensitive", rows) == [None, None]
    assert reasons("time_sensitive", rows, spare_tools=False) == ["time_sensitive", None]


LONG = "Salt keeps food from spoiling. It draws water out of bacteria. People have known that for thousands of years "
LONG_ZH = (
    "盐能防止食物变质。它会把细菌细胞里的水分吸出来。几千年以来人们一直都知道这个道理，并且在各地用不同的办法把鱼和肉长时间地保存"
)

BROKEN = [
    (row("Say it again.", "Say it again."), "reply_is_prompt"),
    (row("Rewrite it.", "The cat sat.", given="The cat sat."), "reply_is_prompt"),
    (row("改写句子。", "他去了公园。", given="他去了公园。"), "reply_is_prompt"),
    (row("Name three metals that rust.", "Name three metals that rust.\nIron."), "repeats_question"),
    (row("请说出三种会生锈的金属。", "请说出三种会生锈的金属。铁。"), "repeats_question"),
    (row("Go on.", " ...\n"), "empty_reply"),
    (row("Draw a logo.", "<noinput>"), "placeholder"),
    (row("Add.", "Three.\n### Instruction: Subtract."), "prompt_marker"),
    (row("Add.", "三。<|im_end|>"), "prompt_marker"),
    (row("Write code.", "```python\nprint(1)"), "code_fence"),
    (row("Answer in JSON.", '{"a": 1,}'), "json"),
    (row("Show it.", "Here:\n```json\n{a: 1}\n```"), "json"),
    (row("List the planets.", "Here is the list of the planets:"), "trailing_colon"),
    (row("Why salt?", LONG + "and used it on ships with"), "truncated"),
    (row("为什么要放盐？", LONG_ZH), "truncated"),
    (talk(("user", "Hi"), ("user", "Hello?"), ("assistant", "Yes.")), "roles"),
    (talk(("user", "Hi")), "roles"),
    (talk(("user", "Call it."), ("function_call", '{"name": "f"'), ("tool", "1"), ("assistant", "One.")), "json"),
    (row("Why salt?", LONG + "and still do."), None),
    (row("为什么要放盐？", LONG_ZH + "下来。"), None),
    (row("Name a river.", "Nile"), None),
    (row("Write a tweet.", "Big day. Great crew! Come and see what we have been building all of this year #launch"), None),
    (row("Answer in JSON.", '{"a": 1}'), None),
    (row("Answer in JSON lines.", '{"a": 1}\n{"a": 2}'), None),
    (row("Write code.", "```python\nprint(1)\n```"), None),
    (row("List it.", "It is short. It is true.\n\n- one thing that goes on for quite a while without any mark at its end"), None),
    (talk(("user", "Call it."), ("function_call", '{"name": "f"}'), ("tool", "1"), ("assistant", "One.")), None),
]


@pytest.mark.parametrize(("given", "reason"), BROKEN)
def test_what_is_malformed_says_how(given: dict[str, object], reason: str | None) -> None:
    assert reasons("malformed_reply", [given]) == [reason]


def test_rules_for_malformed_rows_are_chosen() -> None:
    given = [row("Say it again.", "Say it again."), row("Draw a logo.", "<noinput>")]
    assert reasons("malformed_reply", given, rules=["placeholder"]) == [None, "placeholder"]
    with pytest.raises(SettingsError, match="rules"):
        registry.build({"malformed_reply": {"rules": ["typos"]}})


def test_numbers_are_read_however_they_are_written() -> None:
    written = "1,234.5, １２, 三百二十, 二〇二三年, 3.5万, twenty-five, two hundred and six, 2 million, 一万二千"
    assert [value for value, _ in values(written)] == [1234.5, 12, 320, 2023, 35000, 25, 206, 2e6, 12000]
    assert values("成千上万的人") == []


SUPPORTED = [
    ("It has 14 berths, rebuilt after 1907.", []),
    ("It has fourteen berths and took in 2300 ships.", []),
    ("1. Rebuilt after 1907.\n2. 14 berths.\n3. 2,300 ships.", []),
    ("Together that makes 2314.", []),  # the sum of two given numbers
    ("It has 27 berths.", ["27"]),
    ("It was rebuilt in 1911 for 5.5 million.", ["1911", "5.5 million"]),
]


@pytest.mark.parametrize(("reply", "unsupported"), SUPPORTED)
def test_a_number_is_supported_if_it_stands_there_or_follows(reply: str, unsupported: list[str]) -> None:
    assert unsupported_values(reply, PASSAGE) == unsupported


def test_unsupported_numbers_are_judged_only_where_a_text_is_given() -> None:
    rows = [
        row("When was the harbour rebuilt?", "In 1911.", given=PASSAGE),
        row("港口什么时候重建的？", "一九一一年。", given=PASSAGE_ZH),
        row("港口有哪些泊位？", "共有十四个泊位。", given=PASSAGE_ZH),
        row("When did the war end?", "In 1945."),
        row("Calculate the ships a berth took in.", "About 164.2857.", given=PASSAGE),
        talk(("system", PASSAGE), ("user", "When was it rebuilt?"), ("assistant", "In 1911.")),
    ]
    verdict = judge("unsupported_numbers", rows)
    expected = ["unsupported_numbers", "unsupported_numbers", None, None, None, "unsupported_numbers"]
    assert verdict.reason.to_pylist() == expected
    assert verdict.detail.to_pylist()[:2] == ["1911", "一九一一"]
    assert verdict.value.to_pylist()[0] == 1


def test_the_span_of_a_generated_row_is_what_its_numbers_rest_on() -> None:
    given = table([row("When was the harbour rebuilt?", "In 1911."), row("When was the harbour rebuilt?", "In 1907.")])
    spans = given.append_column("span", pa.array([PASSAGE, PASSAGE]))
    verdict = registry.build("unsupported_numbers").process(spans)
    assert verdict.reason.to_pylist() == ["unsupported_numbers", None]


STOCK = [
    ("Which season is best?", "As an AI language model, I do not have seasons.", True),
    ("Which season is best?", "I'm just an AI, but many people like spring.", True),
    ("Who won?", "As of my last knowledge update in 2021, nobody had.", True),
    ("哪个季节最好？", "作为一个人工智能语言模型，我没有偏好。", True),
    ("哪个季节最好？", "作为一名AI助手，我认为春天不错。", True),
    ("谁赢了？", "截至我的知识更新，还没有结果。", True),
    ("Which season is best?", "Spring, to my mind: everything grows.", False),
    ("What is a language model?", "A language model predicts the next word of a text.", False),
    ("什么是语言模型？", "语言模型用来预测下一个词。", False),
    ("Who are you?", "I am an AI assistant made for this shop.", False),
    ("你是谁？", "我是一个人工智能助手。", False),
]


@pytest.mark.parametrize(("question", "reply", "stock"), STOCK)
def test_stock_phrases_are_found_unless_the_user_asks_who_speaks(question: str, reply: str, stock: bool) -> None:
    assert reasons("stock_phrases", [row(question, reply)]) == (["stock_phrase"] if stock else [None])


def test_kinds_of_stock_phrases_and_ones_of_ones_own() -> None:
    rows = [
        row("Why?", "Certainly! Here is why: it rains."),
        row("Why?", "It rains. I hope this helps!"),
        row("Why?", "Verily it rains."),
    ]
    assert reasons("stock_phrases", rows) == [None, None, None]
    assert reasons("stock_phrases", rows, kinds=["opening", "closing"], extra=["^verily"]) == ["stock_phrase"] * 3
    with pytest.raises(SettingsError, match="not a regular expression"):
        registry.build({"stock_phrases": {"extra": ["(unclosed"]}})
    with pytest.raises(SettingsError, match="matches every text"):
        registry.build({"stock_phrases": {"extra": ["a*"]}})


def test_the_ban_of_stock_phrases_stands_in_either_language_and_names_none_of_them() -> None:
    known = patterns.load("stock_phrases", "identity", "cutoff")
    for lang in ("en", "zh"):  # naming a phrase makes a small model say it
        assert not known.matches(pa.array([ban_line(lang)], pa.large_string())).any()
    assert "Do not speak about yourself" in ban_line("en")
    assert "不要谈论自己" in ban_line("zh")


REFUSALS = [
    ("I'm sorry, but I can't help with that.", "refusal"),
    ("I cannot provide instructions for making weapons.", "refusal"),
    ("Unfortunately, I am not able to assist with this request.", "refusal"),
    ("很抱歉，我无法提供这方面的帮助。", "refusal"),
    ("我不能协助您做违法的事情。", "refusal"),
    ("I don't know who wrote it.", "unknown"),
    ("I'm sorry, but I don't have enough information to answer.", "unknown"),
    ("The passage does not mention the year.", "unknown"),
    ("我不知道这本书的作者是谁。", "unknown"),
    ("文中没有提到具体的年份，因此无法确定。", "unknown"),
    ("You can help by planting trees.", None),
    ("I can't help but smile at this.", None),
    ("The bridge cannot carry trucks.", None),
    ("这座桥不能通行卡车。", None),
]


@pytest.mark.parametrize(("reply", "kind"), REFUSALS)
def test_refusals_and_honest_ignorance_are_told_apart(reply: str, kind: str | None) -> None:
    no, know_not = refuses(Turns(table([row("?", reply)])).of(*REPLIES))
    assert (bool(no[0]), bool(know_not[0])) == (kind == "refusal", kind == "unknown")


GARBLED = [
    ("Why?", "Because it\ufffd rains.", "replacement"),
    ("Why?", "Because\x07 it rains.", "control"),
    ("Why?", "Itâ€™s the rain.", "mojibake"),
    ("为什么？", "锟斤拷因为下雨。", "mojibake"),
    ("Why?", "It rains and it rains " * 20, "repetition"),
    ("为什么？", "因为下雨所以下雨" * 20, "repetition"),
    (
        "为什么天空是蓝色的？",
        "The sky is blue because the air scatters the short waves of light.",
        "other_script",
    ),
    ("Why is the sky blue at noon?", "因为空气散射短波光，所以看起来是蓝色的。", "other_script"),
    ("把“天空是蓝色的”翻译成英文。", "The sky is blue, and that is the whole of the sentence that you gave to me.", None),
    ("为什么天空是蓝色的？", "因为空气散射短波光（Rayleigh scattering）。", None),
    ("Why?", "Café Zoë — it’s fine… 5 °C", None),
    ("Print the primes.", "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47.", None),
]


@pytest.mark.parametrize(("question", "reply", "reason"), GARBLED)
def test_garble_is_named(question: str, reply: str, reason: str | None) -> None:
    assert reasons("garbled_reply", [row(question, reply)]) == [reason]


def test_illegal_keywords_are_sellers_phrases_and_a_list_of_ones_own(tmp_path: Path) -> None:
    rows = [
        row("Ad?", "Cheap fake passports for sale, write to us."),
        row("广告？", "本公司代开发票，低价办证。"),
        row("History?", "The opium wars changed the trade of the empire."),
        row("历史？", "鸦片战争改变了贸易。"),
        row("Plan?", "Project Bluebird starts in May, bluebirds sing."),
        row("计划？", "青鸟计划五月开始。"),
        row("How do I buy cocaine for sale online?", "That is illegal."),
    ]
    assert reasons("illegal_keywords", rows) == ["illegal_keyword", "illegal_keyword", None, None, None, None, None]
    listed = tmp_path / "words.txt"
    listed.write_text("# ours\nproject bluebird\n青鸟\n", "utf-8")
    found = reasons("illegal_keywords", rows, path=str(listed), packaged=[])
    assert found == [None, None, None, None, "illegal_keyword", "illegal_keyword", None]
    (tmp_path / "words.json").write_text(json.dumps({"en": ["bluebird"], "zh": ["青鸟"]}))
    found = reasons("illegal_keywords", rows, path=str(tmp_path / "words.json"), packaged=[])
    assert found == [None, None, None, None, "illegal_keyword", "illegal_keyword", None]
    assert reasons("illegal_keywords", rows, where="all")[-1] == "illegal_keyword"
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(SettingsError, match="no word list"):
        reasons("illegal_keywords", rows, path=str(tmp_path / "bad.json"))


def test_a_long_word_list_becomes_several_expressions() -> None:
    found = patterns.Patterns([f"word{number}x" for number in range(20_000)])
    assert len(found.expressions) > 1
    text = pa.array(["word19999x here", "word5 here", "word7x word8x"], pa.large_string())
    assert found.matches(text).tolist() == [True, False, True]
    assert found.counts(text).tolist() == [1, 0, 2]
    assert found.found(text).to_pylist() == ["word19999x", None, "word7x"]


def test_any_text_passes_through_every_operator() -> None:
    strange = ["", "\x00", "\ud7ff\U0010ffff", "a" * 60_000, "\n" * 5000, "「" * 9, "{" * 999, "```", "é" * 40, "1" * 500, "."]
    rows = [talk(identity="empty"), talk(("tool", "x")), {**talk(), "messages": None}]
    rows += [row(text, text) for text in strange] + [row("?", text, given="零" * 300) for text in strange]
    given = table(rows)
    for name in LOCAL:
        verdict = registry.build(name).process(given)
        assert verdict.table.num_rows == len(rows)
        assert registry.build(name).process(given.slice(0, 0)).table.num_rows == 0
        alone = [registry.build(name).process(given.slice(at, 1)).reason.to_pylist()[0] for at in range(len(rows))]
        assert verdict.reason.to_pylist() == alone, f"{name} decides by the row alone"


def test_turns_fold_messages_back_to_rows() -> None:
    rows = [
        talk(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        talk(),
        row("do it", "x", given="in"),
    ]
    given = table_of(rows, INSTRUCTIONS)
    turns = Turns(given)
    assert turns.of("assistant").by_row().to_pylist() == ["b\n\nd", None, "x"]
    assert turns.of("user").first().by_row().to_pylist() == ["a", None, "do it\n\nin"]
    assert turns.last_role.tolist() == ["assistant", "", "assistant"]
    assert instructions(given, turns).to_pylist() == ["a", None, "do it"]
    assert whole_text(turns).to_pylist() == ["s\n\na\n\nb\n\nc\n\nd", "", "do it\n\nin\n\nx"]
    assert Turns(given.slice(2)).of("user").by_row().to_pylist() == ["do it\n\nin"]
    with pytest.raises(KeyError, match="role and content"):
        Turns(pa.table({"messages": pa.array([[{"who": "x"}]])}))
