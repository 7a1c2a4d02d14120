"""Lines that are no content, English and Chinese, and lines that only look like them."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.text.boilerplate import StripBoilerplate

ENGLISH = "The committee met on Tuesday to discuss the new library, and most of its members agreed with the plan."
CHINESE = "今天下午，委员会讨论了新图书馆的建设方案，大多数成员都同意这个计划，并决定明年开始施工。"


def one(text: str, **options: object) -> str:
    return str(StripBoilerplate(max_share=None, **options).process(pa.table({"text": [text]})).table["text"][0].as_py())


@pytest.mark.parametrize(
    "line",
    [
        "We use cookies to give you the best experience.",
        "Accept all cookies",
        "Cookie Policy",
        "© 2024 Acme Ltd. All rights reserved.",
        "Sign up for our newsletter",
        "Your email address will not be published. Required fields are marked *",
        "You may also like",
        "Filed under: News, Sport",
        "Share this article",
        "Follow us on Twitter",
        "Comments are closed.",
        "Home | About us | Contact",
        "Read more",
        "« Previous | Next »",
        "Page 2 of 7",
        "Log in / Register",
        "Share on Facebook",
        "版权所有 © 2024 某某网",
        "京ICP备12345678号",
        "首页 > 新闻 > 正文",
        "当前位置：首页 > 新闻中心 > 正文",
        "上一篇：春天来了",
        "下一篇：没有了",
        "转载请注明出处",
        "如有侵权，请联系删除",
        "责任编辑：王小明",
        "欢迎关注我们的微信公众号",
        "分享到微信朋友圈",
        "长按识别二维码关注",
        "阅读全文",
        "登录 | 注册",
        "本站使用 Cookie 来改善您的体验",
        "Cookie 政策",
        "(本文来自澎湃新闻，更多原创资讯请下载“澎湃新闻”APP)",
        "本文仅代表作者个人观点",
        "第 1 页 共 3 页",
    ],
)
def test_boilerplate_goes(line: str) -> None:
    assert one(f"{ENGLISH}\n{line}\n{CHINESE}") == f"{ENGLISH}\n{CHINESE}"


@pytest.mark.parametrize(
    "line",
    [
        "Cookies are baked for ten minutes in a hot oven.",
        "The session cookie is set by the server.",
        "Copyright law protects authors.",
        "Home is where the heart is.",
        "Read more books to children.",
        "He read more about it in the library.",
        "## Cart",
        "News",
        "Next, mix the flour with the butter.",
        "Share the cake among your friends.",
        "Subscribe to a topic with `client.subscribe()`.",
        "将包含会话的 Cookie 设置为 HttpOnly，可以防止脚本读取。",
        "版权所有者可以授权他人使用。",
        "他的位置：靠近窗户。",
        "文章的分享让大家很感动。",
        "首页设计很重要，它决定了第一印象。",
        "更多的人参加了会议。",
        "他在登录以后看到了新的消息。",
    ],
)
def test_content_that_shares_its_words_stays(line: str) -> None:
    text = f"{ENGLISH}\n{line}\n{CHINESE}"
    assert one(text) == text


def test_invitations_to_read_on_go_from_the_ends_of_lines() -> None:
    text = (
        f"{ENGLISH} Read more »\n{ENGLISH[:-1]}… [Continue reading]\n{CHINESE}阅读全文>>\n{CHINESE}【详细】\nThe more you read more"
    )
    assert one(text) == f"{ENGLISH}\n{ENGLISH[:-1]}…\n{CHINESE}\n{CHINESE}\nThe more you read more"
    assert one(text, tails=False) == text


def test_repeated_lines_stay_as_often_as_asked() -> None:
    text = "title\n赞 分享\na\n赞 分享 \n}\n}\n}\nb\n 赞 分享\n"
    assert one(text) == text
    assert one(text, repeats=1) == "title\n赞 分享\na\n}\n}\n}\nb"
    assert one(text, repeats=2) == "title\n赞 分享\na\n赞 分享 \n}\n}\n}\nb"
    verdict = StripBoilerplate(repeats=1).process(pa.table({"text": ["same\n" * 9, "same\nother"]}))
    assert verdict.reason is not None
    assert verdict.reason.to_pylist() == ["boilerplate", None]
    assert verdict.table["text"].to_pylist()[1] == "same\nother", "a line of another document is no repetition"


def test_the_rule_that_opens_a_title_stays_and_idle_ones_go() -> None:
    title = f"=====\nTitle\n=====\n\n{ENGLISH}"
    assert one(title) == title
    assert one(f"★★★★★\n{ENGLISH}\n-----\n*****\n{CHINESE}\n-----") == f"{ENGLISH}\n-----\n{CHINESE}"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["\n", "Home | Login", "Read more", "text. ", "---", " ", "阅读全文", "中。", "\x00", "🙂"])).map(
            "".join
        ),
        max_size=4,
    )
)
def test_texts_are_judged_alone(texts: list[str]) -> None:
    for options in ({}, {"repeats": 1}):
        table = StripBoilerplate(max_share=None, **options).process(pa.table({"text": pa.array(texts, pa.large_string())})).table
        assert table["text"].to_pylist() == [one(text, **options) for text in texts]
