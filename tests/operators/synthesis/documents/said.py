"""What a good model says of two small documents, for the recorded replies of these tests."""

from __future__ import annotations

import json
import re

from operators.synthesis.requests import Request
from tests.operators.synthesis.recorded import last

EN = """# Beekeeping

## Inspecting a hive

A hive is inspected every seven days from April to July, because a colony needs eight days to raise a new queen cell.
Open the hive only when the air is warmer than 14 degrees. Lift out the second frame first and look for eggs.

## Feeding

Colonies are fed 15 kilograms of sugar syrup in August. Feed in the evening, so that bees of other hives are not attracted.
Never feed honey of unknown origin, since it may carry spores of foulbrood.

## Swarming

A colony swarms when it lacks room. Add a super when eight of the ten frames are covered with bees.
"""
ZH = """# 养蜂

## 检查蜂箱

四月到七月每七天检查一次蜂箱，因为蜂群培育一个新王台需要八天。只有气温高于14度时才能打开蜂箱。先取出第二张巢脾，查看是否有卵。

## 饲喂

八月给每群蜂饲喂15公斤糖浆。饲喂要在傍晚进行，以免引来其他蜂箱的蜜蜂。不要饲喂来源不明的蜂蜜，因为其中可能带有幼虫腐臭病的孢子。

## 分蜂

蜂群缺少空间时就会分蜂。当十张巢脾中有八张爬满蜜蜂时，要加继箱。
"""

PAIRS = {
    "en": [
        ("A hive is inspected every seven days from April to July, because a colony needs eight days to raise a new queen cell.",
         "Why should a beehive be inspected every seven days in spring?",
         "A hive is inspected every seven days because a colony needs eight days to raise a new queen cell."),
        ("Feed in the evening, so that bees of other hives are not attracted.",
         "At what time of day should bees be fed, and for what reason?",
         "Feed in the evening, so that bees of other hives are not attracted."),
        ("Never feed honey of unknown origin, since it may carry spores of foulbrood.",
         "What risk comes with giving honey of unknown origin to a colony?",
         "Honey of unknown origin may carry spores of foulbrood."),
    ],
    "zh": [
        ("四月到七月每七天检查一次蜂箱，因为蜂群培育一个新王台需要八天。", "春夏季节为什么每七天就要检查一次蜂箱？",
         "因为蜂群培育一个新王台需要八天，所以每七天检查一次蜂箱。"),
        ("饲喂要在傍晚进行，以免引来其他蜂箱的蜜蜂。", "给蜜蜂喂糖浆应当选在一天中的什么时候？",
         "饲喂要在傍晚进行，以免引来其他蜂箱的蜜蜂。"),
        ("不要饲喂来源不明的蜂蜜，因为其中可能带有幼虫腐臭病的孢子。", "来源不明的蜂蜜会给蜂群带来什么危险？",
         "来源不明的蜂蜜可能带有幼虫腐臭病的孢子。"),
    ],
}  # fmt: skip
POINTS = {
    "en": ["Hives are inspected every seven days.", "Bees are fed in the evening.", "Honey of unknown origin may carry spores."],
    "zh": ["四月到七月每七天检查一次蜂箱。", "饲喂要在傍晚进行。", "来源不明的蜂蜜可能带有孢子。"],
}
TURNS = {
    "en": [
        {"user": "When is a hive fed with sugar syrup?", "evidence": "Colonies are fed 15 kilograms of sugar syrup in August.",
         "assistant": "Colonies are fed 15 kilograms of sugar syrup in August."},
        {"user": "And at what time of day is it given?", "evidence": PAIRS["en"][1][0], "assistant": PAIRS["en"][1][2]},
        {"user": "Could I give them old honey instead?", "evidence": PAIRS["en"][2][0],
         "assistant": "Never feed honey of unknown origin, since it may carry spores of foulbrood."},
    ],
    "zh": [
        {"user": "蜂群什么时候需要饲喂糖浆？", "evidence": "八月给每群蜂饲喂15公斤糖浆。",
         "assistant": "八月给每群蜂饲喂15公斤糖浆。"},
        {"user": "那一天中的什么时候喂它们？", "evidence": PAIRS["zh"][1][0], "assistant": PAIRS["zh"][1][2]},
        {"user": "可以用别处的蜂蜜代替它吗？", "evidence": PAIRS["zh"][2][0],
         "assistant": "不要饲喂来源不明的蜂蜜，因为其中可能带有幼虫腐臭病的孢子。"},
    ],
}  # fmt: skip


def lang(request: Request) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", request.messages[0][1]) else "en"


def step(request: Request) -> str:
    """Which step a request belongs to, told from its prompt."""
    system, words = request.messages[0][1], last(request)
    if "list the facts that a document states" in system or "负责列出文档中陈述的事实" in system:
        return "key_points"
    if "examination questions" in system or "编写考题" in system:
        return "pairs"
    if "writes dialogues" in system or "编写用户与助手" in system:
        return "dialogue"
    return "with" if any("<document>" in text for _, text in request.messages[1:]) else "without" if words else "?"


def play(request: Request) -> str:
    """A model that knows its two documents by heart."""
    which, step_of = lang(request), step(request)
    if step_of == "key_points":
        return json.dumps({"key_points": POINTS[which]}, ensure_ascii=False)
    if step_of == "pairs":
        asked = last(request)
        chosen = next(number for number, point in enumerate(POINTS[which]) if f"\n1. {point}\n" in asked)
        evidence, question, answer = PAIRS[which][chosen]
        pair = {"evidence": evidence, "question": question, "answer": answer}
        return json.dumps({"pairs": [pair]}, ensure_ascii=False)
    if step_of == "dialogue":
        return json.dumps({"turns": TURNS[which]}, ensure_ascii=False)
    if step_of == "without":
        return "I would say that bees like flowers." if which == "en" else "蜜蜂喜欢花。"
    asked = last(request)
    known = [(question, answer) for _, question, answer in PAIRS[which]]
    known += [(turn["user"], turn["assistant"]) for turn in TURNS[which]]
    for question, answer in known:
        if asked.rstrip().endswith(question):
            return answer if request.sample % 2 == 0 else answer + (" That is all." if which == "en" else "就是这样。")
    return "?"
