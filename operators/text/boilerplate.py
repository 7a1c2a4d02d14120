"""Lines that are no content: navigation, cookie and copyright notices, separators; English and Chinese.

A line is judged by itself, with regular expressions (RE2, linear time) over all lines of the batch at once; only repetition
looks at the other lines of the document. 32 to 79 MB/s on technical documentation (one core of a busy machine), of which 12%
of the English, 1.6% of the Chinese and 1.9% of the other documents lose lines, most of them copyright lines.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.operator import Operator, Verdict
from operators.text.analysis import Analysis
from operators.text.language import set_column
from operators.text.repair import put

# phrases that make a short line a notice
_NOTICE = (
    r"(?i)(?:\b(?:we|this (?:web)?site|our (?:web)?site) uses? cookies\b|\b(?:accept|allow|reject|manage) (?:all )?cookies\b"
    r"|\bcookie (?:policy|settings|preferences|notice|consent)\b|\ball rights reserved\b"
    r"|^\W*(?:copyright(?:\W+(?:c\W+|copy\W+)*(?:\d{4}|by\b)|\W*(?:©|$))|©|\(c\) ?\d{4})"
    r"|\byou agree to (?:our|the) (?:terms|use of cookies)\b|\benable javascript\b"
    r"|\bjavascript (?:is|must be) (?:disabled|enabled)\b"
    r"|\bsubscribe to (?:our|the) newsletter\b|\bsign up for (?:our|the) newsletter\b"
    r"|\b(?:share this (?:article|post|story|page|entry)\b|click to (?:share|email|print)|follow us on |comments are closed)"
    r"|\byour email address will not be published\b|\brequired fields are marked\b|\bthis site uses akismet\b"
    r"|^\W*(?:you may also like|you might also like|filed under:|posted in:|tagged with:|related (?:posts|articles|stories):)"
    r"|^\W*advertisement\b.*continue reading|\bdownload our (?:free )?app\b|\bread more (?:at|on|about) (?:our|the) (?:blog|site)"
    r"|版权所有(?:[^者人]|$)|版權所有(?:[^者人]|$)|保留所有权利|保留一切权利|著作權所有|ICP[备備证證]|公网安备"
    r"|(?:我们|我們|本站|本网站|本網站|网站|網站).*使用.*cookie|^\s*\S*\s*cookie\s*(?:政策|设置|設定|偏好|声明|聲明)\W*$"
    r"|^\W*(?:当前|您的|现在|目前|您当前的|你的)?位置\s*[:：].*[>»›→＞/]|^\W*(?:上一[篇章页]|下一[篇章頁页])\s*[:：]"
    r"|^\W*(?:转载请注明|如有侵权|版权声明|特别声明\s*[:：]|本文来自|文章来源\s*[:：]|原标题\s*[:：]|更多精彩(?:内容)?|点击上方|长按.*二维码)"
    r"|欢迎关注.*(?:公众号|微博|微信)|分享(?:到|至)\s*(?:微信|微博|朋友圈|好友|QQ|空间|Facebook|LINE)|更多原创资讯请下载|版权归原作者所有"
    r"|仅代表(?:作者|该作者|本文作者).*(?:观点|看法)"
    r"|未经(?:授权|许可|允许|书面).*(?:转载|複製|复制|使用)|本站(?:所有)?(?:内容|文章|资源).*(?:收集|转载|来自|来源于)网络"
    r"|增值电信业务经营许可证|违法和不良信息举报|广告刊登|微信扫一扫|扫码关注|扫描二维码|(?:责任)?编辑[:：]\S{2,4}$)"
)
# a line of one of these alone is navigation
_ALONE = (
    r"home ?page|about us|contact us|log ?in|log ?out|sign ?in|sign ?up|sign ?out|register|my account|subscribe|main menu"
    r"|toggle navigation|site ?map|privacy policy|privacy notice|terms of (?:use|service)|terms (?:and|&) conditions"
    r"|cookies?|advertise|advertisement|advertising|sponsored|cart|checkout|wish ?list|share|share this|tweet|follow us"
    r"|share on (?:facebook|twitter|linkedin)|facebook|twitter|instagram|youtube|linkedin|pinterest|rss|print this page"
    r"|next|previous|prev|back to top|read more|show more|load more|see (?:all|more)|view (?:all|more)|continue reading"
    r"|learn more|click here|skip to (?:main )?(?:content|navigation)|related (?:articles|posts|topics)|recent posts"
    r"|leave a (?:comment|reply)|no comments|show source|this page|quick search|submit|reply"
    r"|首页|首頁|主页|主頁|上一页|上一頁|下一页|下一頁|上一篇|下一篇|上一章|下一章|返回顶部|返回頂部|返回首页|回到顶部|尾页|末页"
    r"|登录|登錄|登入|注册|註冊|退出登录|更多|更多内容|查看更多|加载更多|展开|展开全文|收起|阅读全文|閱讀全文|关于我们|關於我們"
    r"|联系我们|聯絡我們|联系方式|加入我们|网站地图|網站地圖|友情链接|免责声明|免責聲明|隐私政策|隱私權政策|隐私声明|使用条款|服务条款"
    r"|用户协议|意见反馈|广告服务|分享|分享到|转发|收藏|收藏本站|点赞|发表评论|举报|打印本页|关闭窗口|设为首页|相关阅读|相关文章"
    r"|相关推荐|推荐阅读|热门推荐|热门文章|猜你喜欢|下载APP|手机版|电脑版|购物车|我的账户|QQ空间|朋友圈|在线客服"
)
# ... of several of these or of those as well
_AMONG_OTHERS = (
    r"home|about|contact|account|search|menu|navigation|faqs?|help|support|careers|jobs|press|blog|news|privacy|terms|legal"
    r"|imprint|disclaimer|feedback|donate|like|e-?mail|print|back|top|up|first|last|close|skip|cancel|more|table of contents"
    r"|categories|tags|archives|comments?|index|modules|products|services|video|photos"
    r"|返回|退出|搜索|搜尋|导航|導航|菜单|选单|目录|目錄|索引|模块|帮助|帮助中心|广告|评论|打印|关闭|标签|分类|归档|上传|下载|客户端"
    r"|简体|繁體|繁体|中文|English|中文版|字号|大|中|小|微信|微博|豆瓣|客服|新闻|新聞|博客|产品|資訊|资讯|视频|图片|论坛|服务|财经|体育|正文"
)
_BETWEEN = r"[\s|·•>»›«<‹/\-*\[\](){}↑→←:：]"
_NAVIGATION = (
    rf"(?i)^{_BETWEEN}*(?:(?:{_ALONE})|(?:(?:{_ALONE}|{_AMONG_OTHERS}){_BETWEEN}+)+(?:{_ALONE}|{_AMONG_OTHERS})){_BETWEEN}*$"
)
_PAGER = r"(?i)^\W*(?:page \d+(?: of \d+)?|\d+ / \d+|第\s*\d+\s*页(?:\s*[,，/]?\s*共\s*\d+\s*页)?|共\s*\d+\s*页)\W*$"
_SEPARATOR = r"^\s*[-=_~*#•·.+|—–─━═☆★◆◇■□●○▲△▼▽♦]{3,}\s*$"
_RULE = r"^\s*[-=~*#_+]"  # opens a title or front matter where it is the first line of a document
_SENTENCE = r"(?i)[.!?…。！？]\W*"  # what an invitation to read on must follow
_TAIL = (
    r"(?i)[\s\[(【（]*(?:\bread (?:more|the rest of this entry|full (?:story|article))|\bcontinue reading"
    r"|(?:点击)?(?:阅读全文|閱讀全文|查看全文|展开全文)"
    r"|【详细】|\[详细\])[\s\])】）»›→>…]*$"
)
_NOTICE_CHARACTERS = 240
_NAVIGATION_CHARACTERS = 160


class StripBoilerplateSettings(Settings):
    """Which lines to drop, and when a document is nothing else."""

    notices: bool = Field(default=True, description="cookie, copyright, licence-number and newsletter lines")
    navigation: bool = Field(default=True, description="lines made of menu words, share buttons and page numbers")
    separators: bool = Field(
        default=True, description="rows of signs that follow another or stand at either end; a ruled first line stays"
    )
    tails: bool = Field(default=True, description="`Read more`, `阅读全文` and the like after the last sentence of a line")
    repeats: int | None = Field(
        default=None, ge=1, description="a line with letters stays so many times in a document, the later ones go; null: always"
    )
    max_share: float | None = Field(
        default=0.6, ge=0, le=1, description="documents with more of their characters in such lines are rejected; null keeps them"
    )


class StripBoilerplate(Operator):
    """Drop boilerplate lines; reject documents that are mostly boilerplate (`boilerplate`) or left empty (`empty`).

    Adds `boilerplate_share`, the share of characters (line feeds aside) that were dropped.
    """

    name: ClassVar[str] = "strip_boilerplate"
    settings = StripBoilerplateSettings
    adds = ("boilerplate_share",)
    changes_text = True

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        column = table["text"].cast(pa.large_string())
        text = pc.fill_null(column.combine_chunks() if column.num_chunks != 1 else column.chunk(0), "")
        if not table.num_rows:
            text = pa.array([], pa.large_string())
        lines = pc.split_pattern(text, "\n")
        first = np.asarray(lines.offsets, np.int64)
        flat = lines.flatten()
        sizes = pc.utf8_length(flat).to_numpy()
        owner = np.repeat(np.arange(len(text)), np.diff(first))
        drop = self._drop(flat, first)
        if self.config.repeats is not None:
            drop |= _repeated(flat, owner, self.config.repeats)
        cut = np.zeros(len(flat), bool)
        if self.config.tails and len(flat):
            flat, cut = _without_tails(flat, sizes)
        dropped = np.bincount(owner, np.where(drop, sizes, 0), len(text))
        share = np.round(dropped / np.maximum(np.bincount(owner, sizes, len(text)), 1), 6)
        text = _without(text, flat, owner, drop, cut & ~drop)
        empty = pc.equal(pc.utf8_length(text), 0)
        mostly = pa.array(share > self.config.max_share if self.config.max_share is not None else np.zeros(len(share), bool))
        reason = pc.if_else(mostly, "boilerplate", pc.if_else(empty, "empty", pa.scalar(None, pa.string())))
        value = pc.if_else(pc.is_valid(reason), pa.array(share), pa.scalar(None, pa.float64()))
        table = set_column(set_column(table, "text", text), "boilerplate_share", pa.array(share, pa.float32()))
        return Verdict(table, reason, value)

    def _drop(self, flat: pa.Array, first: np.ndarray) -> np.ndarray:
        """bool[lines]: which lines go."""
        drop = np.zeros(len(flat), bool)
        sizes = pc.utf8_length(flat).to_numpy()
        for wanted, limit, patterns in (
            (self.config.notices, _NOTICE_CHARACTERS, (_NOTICE,)),
            (self.config.navigation, _NAVIGATION_CHARACTERS, (_NAVIGATION, _PAGER)),
        ):
            short = np.flatnonzero((sizes > 0) & (sizes <= limit) & ~drop)
            if wanted and len(short):
                candidates = flat.take(pa.array(short))
                for pattern in patterns:
                    drop[short[pc.match_substring_regex(candidates, pattern).to_numpy(zero_copy_only=False)]] = True
        if self.config.separators and len(flat):
            drop |= _idle_separators(flat, first, drop)
        return drop


def _idle_separators(flat: pa.Array, first: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """Separators that separate nothing: after another one, or before or after all text of their document."""
    separator = pc.match_substring_regex(flat, _SEPARATOR).to_numpy(zero_copy_only=False)
    if not separator.any():
        return separator
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(flat)), 0).to_numpy(zero_copy_only=False)
    standing = np.flatnonzero(~blank & ~drop)  # what a reader would see, in order
    if not len(standing):
        return np.zeros(len(flat), bool)
    owner = np.searchsorted(first, standing, "right") - 1
    marks = separator[standing]
    opens = np.r_[True, owner[1:] != owner[:-1]]
    visible = np.flatnonzero(~blank)
    of = np.searchsorted(first, visible, "right") - 1
    begins = visible[np.r_[True, of[1:] != of[:-1]]]  # the first line of each document, dropped or not
    ruled = np.isin(standing, begins)
    ruled &= pc.match_substring_regex(flat.take(pa.array(standing)), _RULE).to_numpy(zero_copy_only=False)
    after_mark = (np.r_[True, marks[:-1]] & ~opens) | (opens & ~ruled)
    closes = np.r_[owner[1:] != owner[:-1], True]
    idle = np.zeros(len(flat), bool)
    idle[standing[marks & (after_mark | closes)]] = True
    return idle


def _repeated(flat: pa.Array, owner: np.ndarray, times: int) -> np.ndarray:
    """bool[lines]: lines with letters that stood `times` times before in their document; spaces at either end do not count."""
    drop = np.zeros(len(flat), bool)
    lettered = np.flatnonzero(pc.match_substring_regex(flat, r"\pL").to_numpy(zero_copy_only=False)) if len(flat) else drop[:0]
    if not len(lettered):
        return drop
    codes = pc.dictionary_encode(pc.utf8_trim_whitespace(flat.take(pa.array(lettered)))).indices.to_numpy(zero_copy_only=False)
    key = owner[lettered].astype(np.int64) * (int(codes.max()) + 1) + codes
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.r_[True, key[order][1:] != key[order][:-1]])
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    drop[lettered[order[rank >= times]]] = True
    return drop


def _without_tails(flat: pa.Array, sizes: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """(the lines without invitations to read on, bool[lines]: which changed); a line that is nothing else stays."""
    hits = pc.match_substring_regex(flat, _SENTENCE + _TAIL.removeprefix("(?i)")).to_numpy(zero_copy_only=False)
    if not hits.any():
        return flat, hits
    shorter = pc.replace_substring_regex(flat.filter(pa.array(hits)), _TAIL, "")
    return put(flat, pa.array(hits), shorter), hits


def _without(text: pa.Array, flat: pa.Array, owner: np.ndarray, drop: np.ndarray, cut: np.ndarray) -> pa.Array:
    """The texts without the dropped lines; texts that lose nothing stay as they are."""
    if not (drop.any() or cut.any()):
        return text
    touched = np.zeros(len(text), bool)
    touched[owner[drop | cut]] = True
    keep = ~drop & touched[owner]
    counts = np.bincount(owner[keep], minlength=len(text))[touched]
    offsets = pa.array(np.r_[0, np.cumsum(counts)].astype(np.int64))
    joined = pc.binary_join(pa.LargeListArray.from_arrays(offsets, flat.filter(pa.array(keep))), pa.scalar("\n", pa.large_string()))
    return put(text, pa.array(touched), pc.utf8_trim_whitespace(joined))
