"""Rules that set aside what a generator gets wrong, with thresholds per language.

The rules for instructions and instances are those of Self-Instruct (Wang et al. 2023, appendix A and its code); the
Chinese ones count characters, and look for Chinese words, where the English ones count and look for words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from pydantic import Field

from operators.config import Settings
from operators.synthesis.novelty import rouge_l, tokenize
from operators.synthesis.requests import Reject

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_ASCII_LETTER = re.compile("[A-Za-z]")
_MARKERS = re.compile(
    r"^[ \t]*(?:#+[ \t]*)?(?:task|input|output|label|example \d+|任务|输入|输出|标签|例子 ?\d+)[ \t]*[:：]",
    re.IGNORECASE | re.MULTILINE,
)
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be by can do for from has have how i if in is it its me my no not of on or our so that the their them
        then there these they this to was we what when which who why will with you your
        的 了 和 是 在 我 有 就 不 人 都 一 个 上 也 很 到 说 要 去 你 会 着 吗 呢 吧 请""",
    )
)
_NO_INPUT = frozenset(
    [
        "",
        "none",
        "no",
        "n/a",
        "na",
        "no input",
        "noinput",
        "nothing",
        "not needed",
        "无",
        "没有",
        "无输入",
        "不需要",
        "无需输入",
        "空",
    ]
)


_REFUSAL = re.compile(
    r"\b(?:i'?m|i am) sorry\b(?! to hear)|\bas an ai\b|\b(?:i'?m|i am) (?:just |only )?an? (?:ai|language model)\b"
    r"|\bi (?:cannot|can'?t|am unable)\b(?! help but)"
    r"|^.{0,8}(?:抱歉|对不起)(?!听到)|作为一个?(?:人工智能|AI|语言模型)|我(?:不能|无法)",
    re.IGNORECASE,
)
_REFUSAL_WINDOW = 160  # characters of a reply's beginning in which a refusal shows itself


_OFFER = re.compile(
    r"\s*(?:(?:sure|certainly|of course|absolutely)[,!.]* )?"
    r"(?:(?:i'?m|i am|i'd be|i would be|i'll be) (?:here|happy|glad|ready|sure|just|able)"
    r"|i (?:can|could|will|would love to) (?:help|assist|make|do))\b"
    r"|\s*(?:当然[，,]?|好的[，,]?)?我(?:很乐意|可以帮|能帮|随时|会帮)",
    re.IGNORECASE,
)
_OFFER_LENGTH = 80  # words or characters: a longer reply that begins with an offer usually goes on to do what it offers
_STATEMENT = re.compile(
    r"(?:the|an?(?= )|this|that|these|those|it|it's|i|i'm|i've|i'd|my|we|our|he|she|his|her|they|their|there|yes|no|sure|here)"
    r"\b[^.!?]*[.!]?\s*$",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"\[[A-Za-z][a-z]+(?: [A-Za-z][a-z]*){0,4}\]|\bX{3,}\b|[\[［【](?:请?插入|填写|某)?[\u4e00-\u9fff]{1,8}[\]］】]|某某"
)
_LABELS = re.compile(
    r"\b(?:classify|categorize|categorise|true or false|yes or no|positive or negative|spam or|which category|sentiment)\b"
    r"|^(?:decide|determine|tell|say|check|identify|judge) (?:me )?(?:if|whether)\b"
    r"|^(?:is|are|does|do|was|were) (?:the|this|these|it)\b.{1,60}\bor\b"
    r"|分类|归类|判断.{0,30}(?:是否|还是|是不是|属于)|(?:正面|积极|真|对|是)(?:还是|或)(?:负面|消极|假|错|否)",
    re.IGNORECASE,
)


_FOREIGN_OUTPUT = re.compile(r"[A-Za-z]{3}|英文|英语|外语|翻译|译成|代码|程序|函数|脚本|编程|注释")
"""Chinese tasks whose output may well be in another script: translations and code."""

_MATERIAL = (
    "sentence|sentences|paragraph|passage|text|article|story|poem|email|list|word|words|number|numbers|question|review|dialogue"
)
_REFERS = re.compile(
    rf"\b(?:the following|given|provided|below)\b|\b(?:this|these) (?:{_MATERIAL})\b"
    rf"|\b(?:rewrite|summari[sz]e|translate|classify|paraphrase|correct|edit|shorten|expand|analy[sz]e|identify|extract|determine|sort|convert)"
    rf"\b.{{0,24}}\b(?:the|a) (?:{_MATERIAL})\b"
    r"|(?:下面|以下|下列|给定|所给|给出的|这个句子|这段|这篇|该句|该段)",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"[\"“「《:：].{8,}")


class InstructionRules(Settings):
    """Which generated instructions are set aside. Lengths are words in English, characters and words in Chinese."""

    min_length: dict[str, int] = Field(default={"en": 4, "zh": 5}, description="shorter instructions are rejected")
    max_length: dict[str, int] = Field(default={"en": 150, "zh": 250}, description="longer instructions are rejected")
    keywords: dict[str, list[str]] = Field(
        default={
            "en": ["image", "images", "graph", "graphs", "picture", "pictures", "photo", "photos", "file", "files", "map", "maps",
                   "draw", "plot", "go to", "video", "audio"],
            "zh": ["图片", "图像", "照片", "图表", "文件", "地图", "画一", "画出", "绘制", "视频", "音频", "前往", "点击"],
        },
        description="things that a text model cannot see or do",
    )  # fmt: skip
    prefixes: dict[str, list[str]] = Field(
        default={"en": ["Write a program"], "zh": ["写一个程序", "编写程序", "编写一个程序"]},
        description="openings that lead to tasks without a usable input",
    )
    min_script: float = Field(default=0.5, ge=0, le=1, description="least share of letters in the script of the language")
    statements: bool = Field(default=False, description="let English sentences pass that state something (`The sky is blue.`)")


def language_of(text: str) -> str:
    """`zh` when at least a fifth of the letters are Han characters, else `en`."""
    if text.isascii():
        return "en"
    letters = sum(char.isalpha() for char in text)
    return "zh" if letters and len(_HAN.findall(text)) >= 0.2 * letters else "en"


def length_of(text: str, lang: str) -> int:
    """Words in English, characters and foreign words in Chinese."""
    return len(tokenize(text)) if lang == "zh" else len(text.split())


def script_share(text: str, lang: str) -> float:
    """The share of letters that belong to the script of the language; 1 when there is no letter."""
    if text.isascii():  # almost all English, without looking at each character
        return 1.0 if lang != "zh" or not _ASCII_LETTER.search(text) else 0.0
    letters = sum(char.isalpha() for char in text)
    if not letters:
        return 1.0
    return round(len((_HAN if lang == "zh" else _ASCII_LETTER).findall(text)) / letters, 6)


def check_instruction(text: str, lang: str, rules: InstructionRules) -> Reject | None:
    """Why an instruction is set aside, or None. The first failing rule names the reason."""
    if not text.strip():
        return Reject("empty")
    length = length_of(text, lang)
    if length < rules.min_length.get(lang, 0):
        return Reject("too_short", length)
    if length > rules.max_length.get(lang, length):
        return Reject("too_long", length)
    keyword = _keywords(lang, tuple(rules.keywords.get(lang, ()))).search(text)
    if keyword:
        return Reject("keyword", detail=keyword.group())
    if any(text.startswith(prefix) for prefix in rules.prefixes.get(lang, ())):
        return Reject("prefix")
    if unicodedata.category(text[0])[0] in "PSZC":
        return Reject("punctuation_start")
    if lang == "en" and not text[0].isascii():
        return Reject("non_ascii_start")
    share = script_share(text, lang)
    if share < rules.min_script:
        return Reject("wrong_language", share)
    if _MARKERS.search(text):
        return Reject("prompt_marker")
    if _PLACEHOLDER.search(text):
        return Reject("placeholder")
    if lang == "en" and not rules.statements and _STATEMENT.match(text):
        return Reject("statement")
    return None


@lru_cache(maxsize=64)
def _keywords(lang: str, words: tuple[str, ...]) -> re.Pattern[str]:
    if not words:
        return re.compile(r"(?!)")
    joined = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(joined) if lang == "zh" else re.compile(rf"\b(?:{joined})\b", re.IGNORECASE)


def check_instance(instruction: str, given: str, output: str, lang: str, min_script: float = 0.5) -> Reject | None:
    """Why one (input, output) of a task is set aside, or None."""
    if not output.strip():
        return Reject("empty_output")
    if output.strip() == given.strip():
        return Reject("output_is_input")
    if output.strip() == instruction.strip():
        return Reject("output_is_instruction")
    if given.rstrip().endswith((":", "：")) or output.rstrip().endswith((":", "：")):
        return Reject("trailing_colon")
    if _MARKERS.search(output) or _MARKERS.search(given):
        return Reject("prompt_marker")
    foreign = lang == "zh" and script_share(output, lang) < min_script and length_of(output, lang) > 8
    if foreign and not _FOREIGN_OUTPUT.search(instruction):
        return Reject("wrong_language", script_share(output, lang))
    if refuses(output):
        return Reject("refusal")
    if _OFFER.match(output.replace("\u2019", "'")) and length_of(output, lang) < _OFFER_LENGTH:
        return Reject("no_answer")
    repetition = repeated_share(output)
    if repetition > 0.5:
        return Reject("repetitive", repetition)
    return None


def check_input(instruction: str, given: str) -> Reject | None:
    """Why an input that was written for a task is none, or None: it repeats the task, or refuses it."""
    if given and rouge_l(instruction, given) >= 0.8:
        return Reject("input_is_instruction")
    if refuses(given):
        return Reject("refusal")
    return None


def refers_to_input(instruction: str) -> bool:
    """True when an instruction speaks of material that it does not contain (`the following text`, `给定的句子`)."""
    return bool(_REFERS.search(instruction)) and not _QUOTED.search(instruction)


def wants_label(instruction: str) -> bool:
    """True when the words of an instruction ask for a label from a small set (`Classify`, `Decide whether`, `判断……是否`)."""
    return bool(_LABELS.search(instruction))


def copies(text: str, shown: Sequence[str], limit: float = 0.7) -> Reject | None:
    """A reject when a text repeats one of those that the prompt showed as examples."""
    for example in shown:
        similarity = rouge_l(example, text)
        if similarity >= limit and length_of(text, language_of(text)) > 3:
            return Reject("copied_example", similarity)
    return None


def refuses(text: str) -> bool:
    """True when a reply begins by refusing, by apologising, or by speaking of itself as a language model."""
    return bool(_REFUSAL.search(text[:_REFUSAL_WINDOW].replace("\u2019", "'")))


def contradicts(instances: Sequence[tuple[str, str]]) -> bool:
    """True when one input of a task has two different outputs."""
    outputs: dict[str, str] = {}
    return any(outputs.setdefault(given.strip(), output.strip()) != output.strip() for given, output in instances)


def repeated_share(text: str, n: int = 4) -> float:
    """The share of a text's token n-grams that occurred before in it; 0 below 2n tokens."""
    tokens = tokenize(text)
    if len(tokens) < 2 * n:
        return 0.0
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return round(1 - len(set(grams)) / len(grams), 6)


def without_content(text: str) -> bool:
    """True when a text is made of punctuation and stop words only."""
    return all(token in _STOP_WORDS for token in tokenize(text))


def no_input(text: str) -> bool:
    """True for the ways a model says that a task takes no input."""
    return text.strip().strip(".。<>()（）[]\"'“”").strip().lower() in _NO_INPUT


def join_input(instruction: str, given: str) -> str:
    """The user's message of a task: the instruction, then its input after an empty line if there is one."""
    return f"{instruction}\n\n{given}" if given else instruction
