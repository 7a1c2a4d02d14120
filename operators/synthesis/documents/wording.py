"""What goes into the prompts beside the document, in English and Chinese: types of questions, difficulty, shapes of replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

QuestionType = Literal[
    "definition", "procedure", "comparison", "causal", "application", "counterfactual", "numeric", "summary", "condition"
]
Difficulty = Literal["easy", "medium", "hard"]

QUESTION_TYPES: dict[QuestionType, dict[str, str]] = {
    "definition": {"en": "definition (What is ...?)", "zh": "定义（什么是……？）"},
    "procedure": {"en": "procedure (How is ... done?)", "zh": "步骤（怎样……？）"},
    "comparison": {"en": "comparison (How does ... differ from ...?)", "zh": "比较（……与……有何异同？）"},
    "causal": {"en": "cause and effect (Why ...?)", "zh": "因果（为什么……？）"},
    "application": {"en": "application (Someone has to ... What should they do?)", "zh": "应用（某人需要……，应当怎么做？）"},
    "counterfactual": {"en": "counterfactual (What would happen if ...?)", "zh": "反事实（如果……会怎样？）"},
    "numeric": {"en": "quantity, limit, date or version (How many ...? When ...?)", "zh": "数值、日期或版本（多少……？何时……？）"},
    "summary": {"en": "summary (What are the main ...?)", "zh": "概括（……主要有哪些？）"},
    "condition": {"en": "condition (In which case ...?)", "zh": "条件（在什么情况下……？）"},
}
DIFFICULTY: dict[Difficulty, dict[str, str]] = {
    "easy": {"en": "easy: one fact answers it", "zh": "容易：一条事实即可回答"},
    "medium": {"en": "medium: two facts must be connected", "zh": "中等：需要把两条事实联系起来"},
    "hard": {"en": "challenging: it takes reasoning over several facts", "zh": "有挑战性：需要结合多条事实进行推理"},
}
NO_DOMAIN = {"en": "the subject of the document", "zh": "文档所涉及的领域"}

EVIDENCE, QUESTION, ANSWER = "evidence", "question", "answer"
USER, ASSISTANT = "user", "assistant"
LABELS = {
    EVIDENCE: ("Evidence", "Quote", "依据", "证据", "原句", "出处"),
    QUESTION: ("Question", "Q", "问题", "问"),
    ANSWER: ("Answer", "A", "答案", "回答", "答"),
    USER: ("User", "Human", "用户"),
    ASSISTANT: ("Assistant", "GPT", "助手", "助理"),
}

FORMS: dict[str, dict[bool, dict[str, str]]] = {
    "key_points": {
        True: {"en": "Reply with JSON that has the list `key_points`.", "zh": "用 JSON 回复，其中包含列表 key_points。"},
        False: {"en": "Reply with a numbered list, one key point a line.", "zh": "用编号列表回复，每行一个要点。"},
    },
    "pairs": {
        True: {
            "en": "Reply with JSON that has the list `pairs` of objects with evidence, question and answer.",
            "zh": "用 JSON 回复，其中包含列表 pairs，每个元素有 evidence（依据）、question（问题）和 answer（答案）。",
        },
        False: {
            "en": "Reply with three lines for each question that begin with Evidence:, Question: and Answer:.",
            "zh": "每个问题用三行回复，分别以“依据：”“问题：”“答案：”开头。",
        },
    },
    "dialogue": {
        True: {
            "en": "Reply with JSON that has the list `turns` of objects with user, evidence and assistant.",
            "zh": "用 JSON 回复，其中包含列表 turns，每个元素有 user（用户）、evidence（依据）和 assistant（助手）。",
        },
        False: {
            "en": "Reply with three lines for each turn that begin with User:, Evidence: and Assistant:.",
            "zh": "每一轮用三行回复，分别以“用户：”“依据：”“助手：”开头。",
        },
    },
}
"""What the shape of a reply is, said in the prompt: JSON for structured output, otherwise lines."""

EXAMPLES: dict[str, dict[bool, dict[str, str]]] = {
    "key_points": {
        True: {
            "en": '{"key_points": ["Rice seed is soaked in water at 25 degrees for two days before it is sown.", '
            '"Soaked rice seed comes up four days sooner than dry seed."]}',
            "zh": '{"key_points": ["稻种播种前要在25度的水中浸泡两天。", "浸泡过的稻种比干种早四天出苗。"]}',
        },
        False: {
            "en": "1. Rice seed is soaked in water at 25 degrees for two days before it is sown.\n"
            "2. Soaked rice seed comes up four days sooner than dry seed.",
            "zh": "1. 稻种播种前要在25度的水中浸泡两天。\n2. 浸泡过的稻种比干种早四天出苗。",
        },
    },
    "pairs": {
        True: {
            "en": '{"pairs": [{"evidence": "Seed that was soaked comes up four days sooner than dry seed.", '
            '"question": "Why is it worth soaking rice seed before sowing?", '
            '"answer": "Soaked rice seed comes up four days sooner than dry seed."}]}',
            "zh": '{"pairs": [{"evidence": "浸泡过的种子比干种早四天出苗。", "question": "播种前为什么值得浸泡稻种？", '
            '"answer": "浸泡过的稻种比干种早四天出苗。"}]}',
        },
        False: {
            "en": "Evidence: Seed that was soaked comes up four days sooner than dry seed.\n"
            "Question: Why is it worth soaking rice seed before sowing?\n"
            "Answer: Soaked rice seed comes up four days sooner than dry seed.",
            "zh": "依据：浸泡过的种子比干种早四天出苗。\n问题：播种前为什么值得浸泡稻种？\n答案：浸泡过的稻种比干种早四天出苗。",
        },
    },
    "dialogue": {
        True: {
            "en": '{"turns": [{"user": "How long is rice seed soaked before sowing?", '
            '"evidence": "Soak the rice seed for two days in water at 25 degrees, then sow it.", '
            '"assistant": "Rice seed is soaked for two days in water at 25 degrees."}, '
            '{"user": "And what is gained by that?", "evidence": "Seed that was soaked comes up four days sooner than dry seed.", '
            '"assistant": "Soaked seed comes up four days sooner than dry seed."}]}',
            "zh": '{"turns": [{"user": "稻种播种前要浸泡多久？", "evidence": "稻种在25度的水中浸泡两天后播种。", '
            '"assistant": "稻种要在25度的水中浸泡两天。"}, {"user": "这样做有什么好处？", '
            '"evidence": "浸泡过的种子比干种早四天出苗。", "assistant": "浸泡过的种子比干种早四天出苗。"}]}',
        },
        False: {
            "en": "User: How long is rice seed soaked before sowing?\n"
            "Evidence: Soak the rice seed for two days in water at 25 degrees, then sow it.\n"
            "Assistant: Rice seed is soaked for two days in water at 25 degrees.\n"
            "User: And what is gained by that?\nEvidence: Seed that was soaked comes up four days sooner than dry seed.\n"
            "Assistant: Soaked seed comes up four days sooner than dry seed.",
            "zh": "用户：稻种播种前要浸泡多久？\n依据：稻种在25度的水中浸泡两天后播种。\n助手：稻种要在25度的水中浸泡两天。\n"
            "用户：这样做有什么好处？\n依据：浸泡过的种子比干种早四天出苗。\n助手：浸泡过的种子比干种早四天出苗。",
        },
    },
}
"""Replies to the worked example of each prompt, in both shapes."""

CLARIFYING = {
    "en": "The user's first question is unclear about one thing. The assistant's first turn is a short question back that asks "
    "for it (with empty evidence), the user then says what is meant, and the assistant answers.",
    "zh": "用户的第一个问题有一处不明确。助手的第一轮回复是一个简短的反问（依据留空），用户随后说明具体所指，助手再回答。",
}
NOT_CLARIFYING = {"en": "The assistant answers each question directly.", "zh": "助手直接回答每个问题。"}


def numbered(lines: Sequence[str]) -> str:
    """The lines as a numbered list."""
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
