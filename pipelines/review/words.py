"""Every sentence of the review page, in English and in Chinese."""

from __future__ import annotations

from markupsafe import Markup

WORDS: dict[str, tuple[str, str]] = {
    "title": ("Review", "人工评审"),
    "skip_link": ("Skip to the row", "跳到当前条目"),
    "language": ("Language", "界面语言"),
    "theme": ("Theme", "主题"),
    "auto": ("Auto", "自动"),
    "light": ("Light", "浅色"),
    "dark": ("Dark", "深色"),
    "task_rows": (
        "Read each conversation and say whether you would train a model on it: the reply is correct, follows the request, and is "
        "supported by the source where one stands beside it.",
        "阅读每段对话，判断是否愿意用它训练模型：回复正确、符合要求，且旁边给出来源时有来源依据。",
    ),
    "task_pairs": (
        "Two replies to one prompt, in random order. Say which is better, or that both are as good, or that neither is any good.",
        "同一提示的两条回复，顺序随机。请选出更好的一条，或判断两条相当，或都不可用。",
    ),
    "reviewer": ("Your name", "评审人"),
    "download": ("Download verdicts", "下载评审结果"),
    "load": ("Load verdicts", "载入评审结果"),
    "row": ("Row", "第"),
    "of": ("of", "条，共"),
    "row_end": ("", "条"),
    "judged": ("judged", "条已评"),
    "conversation": ("Conversation", "对话"),
    "prompt": ("Prompt", "提示"),
    "left": ("Reply A", "回复 A"),
    "right": ("Reply B", "回复 B"),
    "source": ("Source", "来源"),
    "points": ("Key points", "要点"),
    "tools": ("Tools", "工具"),
    "note": ("Note (optional)", "备注（可选）"),
    "previous": ("Previous", "上一条"),
    "next": ("Next", "下一条"),
    "accept": ("Accept", "接受"),
    "reject": ("Reject", "拒绝"),
    "left_better": ("A is better", "A 更好"),
    "right_better": ("B is better", "B 更好"),
    "tie": ("As good", "相当"),
    "neither": ("Neither", "都不可用"),
    "skip": ("Skip", "跳过"),
    "role.system": ("System", "系统"),
    "role.user": ("User", "用户"),
    "role.assistant": ("Assistant", "助手"),
    "role.function_call": ("Call of a function", "函数调用"),
    "role.tool": ("Result of a function", "函数结果"),
    "role.document": ("Document", "文档"),
    "more": ("… {n} more characters are not shown", "……另有 {n} 个字符未显示"),
    "no_text": ("(empty)", "（空）"),
    "all": ("All rows", "全部条目"),
    "done": ("Every row is judged. Download the verdicts and import them.", "全部评完。请下载评审结果并导入。"),
    "unkept": (
        "This browser does not let the page keep your progress: download the verdicts before you close it.",
        "浏览器不允许本页保存进度：关闭前请先下载评审结果。",
    ),
    "no_name": ("Enter your name first.", "请先填写评审人。"),
    "wrong_file": ("This file holds no verdicts of this sample.", "此文件不含本样本的评审结果。"),
    "loaded": ("Verdicts loaded.", "评审结果已载入。"),
    "keys": ("Keys", "快捷键"),
    "footer": (
        "This page works without a network and keeps your progress in this browser alone. Text of rows is shown as it is; control "
        "characters are made visible.",
        "本页无需网络，进度仅保存在此浏览器中。条目原文照录，控制字符以可见符号表示。",
    ),
    "script": ("This page needs JavaScript to take verdicts.", "本页需要 JavaScript 才能记录评审。"),
}


def say(key: str) -> Markup:
    """A sentence in both languages; the page shows the one that its reader has chosen."""
    return Markup('<span class="en" lang="en">{}</span><span class="zh" lang="zh-CN">{}</span>').format(*WORDS[key])
