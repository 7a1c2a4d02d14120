"""What a question and an answer may not say, because their reader has no document beside them.

A single-turn question must name what it asks about: references to "the text" or "the author", and openings such as "What
does it do?", are *vague references without context*. Later questions of a dialogue are the reverse: they must refer back.
"""

from __future__ import annotations

import re

_SOURCE = "text|passage|document|article|excerpt|paragraph|section|chapter|snippet|context|key points?|material|reading|author"
_OTHER = "field|file|box|editor|type"  # `the text field` is a thing of its own
_TOLD = "described|mentioned|stated|shown|given|listed|discussed|provided|explained|presented|outlined|noted"
_BE = "is|are|was|were|been|as|be"
_VAGUE = {
    "en": (
        rf"\b(?:the|this|that|these|above|given|provided|following|said) (?:\w+ )?(?:{_SOURCE})\b(?! (?:{_OTHER}))",
        r"\b(?:example|table|list|code|figure|steps?) (?:above|below)\b",
        rf"\b(?:{_BE}) (?:{_TOLD}) (?:above|below|here|earlier|previously|in the (?:{_SOURCE}))\b",
        rf"\b(?:{_TOLD}) above\b|\bas mentioned\b|\baccording to the (?:information|source|content)\b",
        r"\bthe information (?:provided|given|above)\b",
    ),
    "zh": (
        "本文|该文(?!件)|此文(?!件)|原文|文中|文章|文段|短文|上文|下文|前文|上述|前述|如上|如下所示",
        "以上(?:内容|材料|文字|信息|文本|段落|代码)|下面的(?:文|材料|内容)",
        "(?:这|该|此|所给|给定|给出)的?(?:段(?:话|文字|内容|文本|代码)?|篇|份?(?:文档|材料|资料|文本))",
        "文档(?:中|里|内|所|提到|指出|说明)|材料中|资料中|作者|本(?:节|章|段|页)",
        "根据(?:文档|材料|资料|内容|文本|所给|提供)",
    ),
}
_ASKED = "what|how|why|when|where|which|who|is|are|does|do|did|can|could|should|would|will|explain|describe|list|and|in what way"
_VERBS = "is|are|was|were|does|do|did|can|could|should|would|will|must|happens (?:to|if|when|with)"
_EMPTY = r"(?:worth\b|(?:\w+ ){1,3}(?:to|that|for|when|if)\b)"  # `is it safe to open a hive` asks about the hive
_DANGLING = {
    "en": (
        rf"\A(?:\W*(?:{_ASKED})\b\W*){{1,3}}(?:(?:{_VERBS}) )?(?:they|he|she|them|its|their|this|these|those|such)\b",
        rf"\A(?:\W*(?:{_ASKED})\b\W*){{1,3}}(?:(?:{_VERBS}) )?(?:(?<=is )it(?! {_EMPTY})|(?<!is )it)\b",
        r"\b(?:of|about|behind|for) (?:this|these|that)\W*\Z",
    ),
    "zh": (
        "\\A(?:请问?|请?(?:解释|说明|描述|列出)|为什么|如何|怎样|怎么|什么是)?"
        "(?:它|他|她|其(?![他实余中])|这(?!样做)|那(?!么)|此(?!外)|该)",
    ),
}  # fmt: skip
_BACK = {
    "en": (
        r"\b(?:it|its|they|them|their|those|these|this|he|she|him|her|his|such|one of|instead|then|also|so|as well)\b",
        r"\bthat (?!is\b|are\b|the\b|you\b)\w+|\bthat\?",
        r"\bthe (?:former|latter|first|second|last|same|other)\b|\byou (?:said|mentioned|described|just)\b",
        r"\A(?:and|but|what about|how about|what if|why not|why\?)",
    ),
    "zh": (
        "它|他们|她|其(?![他实])|这|那|此|该|前者|后者|上面|刚才|刚刚|前面|你(?:说|提到)|同样|另外|还(?:有|需要|能|可以)",
        "呢[？?]?\\Z|\\A(?:所以|如果|为什么|但|而|然后|除此)",
    ),
}
_STOCK = (
    r"\bas an? (?:ai\b|artificial intelligence\b|large language model|language model)",
    r"\A\s*(?:sure|certainly|of course|absolutely|great question|good question)\b[!,.]",
    r"\bI hope this helps\b|\blet me know if\b|\bit(?:'s| is) important to note that\b",
    r"\bhere(?:'s| is| are) (?:the|an?|your|some) (?:answer|question|response|key points)",
    "作为一?[个名]?(?:人工智能|AI|语言模型|大模型)|\\A\\s*(?:当然可以|当然[，！!]|好的[，！!。]|很好的问题)",
    "希望(?:这|以上|对你|对您)|如果(?:您|你)还有(?:其他|任何|什么)|值得注意的是|综上所述|总而言之",
)


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


_VAGUE_RE, _DANGLING_RE, _BACK_RE = (
    {lang: _any(*patterns) for lang, patterns in table.items()} for table in (_VAGUE, _DANGLING, _BACK)
)
_STOCK_RE = _any(*_STOCK)
_ASKS = re.compile(r"[?？][\s\"”’)）」]*\Z")


def vague_reference(text: str, lang: str) -> str | None:
    """The words that refer to a text which the reader does not have, if there are any."""
    found = _VAGUE_RE[lang].search(text)
    return found.group() if found else None


def dangling(question: str, lang: str) -> str | None:
    """The opening of a question whose subject is a pronoun that nothing precedes, if it has one."""
    found = _DANGLING_RE[lang].search(question)
    return found.group() if found else None


def refers_back(question: str, lang: str) -> bool:
    """True when a question needs what was said before: a pronoun, `that step`, an ellipsis; 它, 这一步, 那…呢."""
    return bool(_BACK_RE[lang].search(question))


def stock_phrase(text: str) -> str | None:
    """A set phrase of assistants that carries nothing, if there is one."""
    found = _STOCK_RE.search(text)
    return found.group().strip() if found else None


def asks(text: str) -> bool:
    """True when a text ends with a question."""
    return bool(_ASKS.search(text))
