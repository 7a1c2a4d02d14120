"""What goes into the prompts beside the document, in English and Chinese: types of questions, difficulty, shapes of replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

QuestionType = Literal[
    "definition", "procedure", "comparison", "causal", "application", "counterfactual", "numeric", "summary", "condition"
]
Difficulty = Literal["easy", "medium", "hard"]

QUESTION_TYPES: dict[QuestionType, dict[str, str]] = {
    "definition": {"en": "definition: what something is and what sets it apart", "zh": "定义：某事物是什么、与其他事物有何区别"},
    "procedure": {"en": "procedure: how something is done, step by step", "zh": "步骤：某件事应怎样一步步完成"},
    "comparison": {"en": "comparison: how two things differ or agree", "zh": "比较：两个事物的异同"},
    "causal": {"en": "cause: why something is so, or what follows from it", "zh": "因果：为什么会这样，或会带来什么结果"},
    "application": {
        "en": "application: a concrete situation in which a person must decide or act",
        "zh": "应用：一个具体情境，其中的人需要作出判断或采取行动",
    },
    "counterfactual": {"en": "counterfactual: what would happen if something were otherwise", "zh": "反事实：如果情况不同会怎样"},
    "numeric": {"en": "numbers: a quantity, a limit, a date or a version", "zh": "数值：数量、限制、日期或版本"},
    "summary": {"en": "summary: the main points of a matter, brought together", "zh": "概括：把一个问题的要点归纳起来"},
    "condition": {
        "en": "condition: when or for whom something applies, and its exceptions",
        "zh": "条件：在什么情况下适用，有哪些例外",
    },
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

KEY_POINTS_FORM = {
    True: {"en": 'Reply with JSON only: {"key_points": ["...", "..."]}', "zh": '只用 JSON 回复：{"key_points": ["……", "……"]}'},
    False: {"en": "Reply with a numbered list, one key point a line.", "zh": "用编号列表回复，每行一个要点。"},
}
PAIRS_FORM = {
    True: {
        "en": 'Reply with JSON only: {"pairs": [{"evidence": "...", "question": "...", "answer": "..."}]}',
        "zh": '只用 JSON 回复：{"pairs": [{"evidence": "……", "question": "……", "answer": "……"}]}',
    },
    False: {
        "en": "Reply in this form, once for each question:\nEvidence: ...\nQuestion: ...\nAnswer: ...",
        "zh": "每个问题按如下格式回复一次：\n依据：……\n问题：……\n答案：……",
    },
}
DIALOGUE_FORM = {
    True: {
        "en": 'Reply with JSON only: {"turns": [{"user": "...", "evidence": "...", "assistant": "..."}]}',
        "zh": '只用 JSON 回复：{"turns": [{"user": "……", "evidence": "……", "assistant": "……"}]}',
    },
    False: {
        "en": "Reply in this form, once for each turn:\nUser: ...\nEvidence: ...\nAssistant: ...",
        "zh": "每一轮按如下格式回复：\n用户：……\n依据：……\n助手：……",
    },
}
CLARIFYING = {
    "en": "The user's first question is unclear about one thing. The assistant's first turn is a short question back that asks "
    "for it (with empty evidence), the user then says what is meant, and the assistant answers.",
    "zh": "用户的第一个问题有一处不明确。助手的第一轮回复是一个简短的反问（依据留空），用户随后说明具体所指，助手再回答。",
}
NOT_CLARIFYING = {"en": "The assistant answers each question directly.", "zh": "助手直接回答每个问题。"}


def numbered(lines: Sequence[str]) -> str:
    """The lines as a numbered list."""
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
