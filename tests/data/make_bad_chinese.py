"""Makes bad_chinese.jsonl: Chinese text that a corpus should not hold, by kind. See README.md.

`python -m tests.data.make_bad_chinese` from a checkout that has the data pack beside it (../shared/data). What publishers
own is never written to the file: `from_pages` cuts it out of the pack's pages each time it is asked for.
"""

# ruff: noqa: E501 (lists of Chinese words, two columns a character)

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from fastwarc.warc import ArchiveIterator, WarcRecordType
from lxml import html

from operators.text.encoding import declared_charset, decode

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples" / "data" / "quality_bad.jsonl"
PACK = HERE.parents[2] / "shared" / "data"
_PAGE = "excerpt of a web page's navigation; text of its publisher"
_OWN = "CC0-1.0"
_MENU_CHARACTERS, _LINK_CHARACTERS = 360, 400

CITIES = ["北京", "上海", "广州", "深圳", "成都", "武汉", "西安", "南京", "杭州", "重庆", "天津", "苏州", "长沙", "青岛", "郑州"]
SERVICES = [
    "搬家公司",
    "装修公司",
    "月嫂培训",
    "二手车回收",
    "开锁换锁",
    "管道疏通",
    "办公室出租",
    "翻译公司",
    "会计代账",
    "瓷砖批发",
]
STUFFING = [
    "{c}{s}，{c}{s}哪家好，{c}{s}价格，{c}{s}电话，{c}{s}排名，{c}{s}推荐。",
    "{c}{s}找我们，{c}专业{s}，{c}正规{s}，{c}便宜{s}，{c}{s}公司，{c}{s}服务，{c}{s}联系方式，{c}附近{s}。",
    "{c}{s}哪家好？{c}{s}多少钱？{c}{s}怎么样？{c}{s}电话是多少？{c}{s}，选择{c}{s}，就选{c}最好的{s}！",
    "提供{c}{s}、{c}{s}价格、{c}{s}报价、{c}{s}厂家、{c}{s}品牌、{c}{s}图片、{c}{s}批发、{c}{s}地址。",
]
ADVERTISEMENTS = [
    "全场五折起，限时抢购，点击下方链接立即购买，仅此一天，错过不再有！",
    "加微信领取红包，新用户注册就送一百元，邀请好友再送五十元，数量有限，先到先得！",
    "正品保证，七天无理由退货，全国包邮，货到付款，支持验货，欢迎新老顾客光临本店选购！",
    "专业代写各类文章，价格优惠，质量保证，速度快，有需要的朋友请联系客服，全天在线为您服务！",
    "想减肥吗？无需运动，无需节食，一个月轻松瘦二十斤，无效退款，马上咨询！",
    "贷款秒批，无抵押无担保，凭身份证即可办理，当天放款，额度高，利息低，赶快拨打热线电话！",
    "招聘兼职，在家就能做，一天三百，工资日结，学生、宝妈都可以，联系方式见下方，非诚勿扰！",
    "本站所有软件均可免费下载，下载前请先关注公众号，回复关键字获取提取码，永久有效！",
]
PRODUCTS = [
    "手机壳",
    "连衣裙",
    "运动鞋",
    "保温杯",
    "蓝牙耳机",
    "行李箱",
    "儿童玩具",
    "羽绒服",
    "茶叶礼盒",
    "沙发垫",
    "面膜",
    "电动车",
]
ATTRIBUTES = [
    "新款",
    "韩版",
    "女",
    "男",
    "加厚",
    "批发",
    "特价",
    "包邮",
    "正品",
    "图片",
    "价格",
    "品牌",
    "推荐",
    "排行榜",
    "2024",
    "淘宝",
]
SEPARATORS = [" ", "，", "、", "|", "\n", ",", " / ", "_", "；", "·"]
MENUS = [
    "首页 关于我们 公司简介 企业文化 组织机构 发展历程 新闻中心 公司新闻 行业动态 媒体报道 产品展示 解决方案 成功案例 客户服务 下载中心"
    " 常见问题 售后服务 人才招聘 招聘职位 人才理念 联系我们 在线留言 网站地图 友情链接 设为首页 加入收藏",
    "登录 注册 忘记密码 我的账户 购物车 我的订单 收藏夹 优惠券 客服中心 帮助中心 退换货 配送方式 支付方式 发票说明 商家入驻 手机版"
    " 返回顶部 上一页 下一页 共12页 跳转到 确定 取消 提交 重置 搜索 高级搜索 热门搜索 清空历史",
    "文件 编辑 查看 插入 格式 工具 表格 窗口 帮助 新建 打开 最近的文档 关闭 向导 模板 保存 另存为 全部保存 版本 导出 预览 打印 属性 退出"
    " 撤销 恢复 剪切 复制 粘贴 选择性粘贴 全选 查找 替换 导航 缩放 工具栏 状态栏 标尺 网格",
    "要闻 国内 国际 社会 军事 财经 股票 基金 科技 数码 汽车 房产 体育 篮球 足球 娱乐 电影 电视 音乐 时尚 美容 健康 教育 留学 旅游 美食 星座"
    " 游戏 动漫 图片 视频 直播 博客 论坛 专题 评论 滚动 排行",
    "第一章 第二章 第三章 第四章 第五章 第六章 第七章 第八章 第九章 第十章 第十一章 第十二章 第十三章 第十四章 第十五章 上一章 目录 下一章"
    " 加入书签 投推荐票 返回书页 字体 大 中 小 背景 夜间模式 手机阅读 章节报错",
]


def _pages() -> Iterator[tuple[str, html.HtmlElement]]:
    """(URL, tree without scripts) of the Chinese news and portal pages of the pack."""
    path = PACK / "html" / "web"
    ground = [json.loads(line) for line in (path / "ground_truth.jsonl").read_text("utf-8").splitlines()]
    wanted = {row["record_id"]: row["url"] for row in ground}
    with open(path / "pages.warc.gz", "rb") as stream:
        for record in ArchiveIterator(stream, record_types=WarcRecordType.response, parse_http=True):
            url = wanted.get(record.headers.get("WARC-Record-ID", ""), record.headers.get("WARC-Target-URI", ""))
            body = record.reader.read()
            text = decode(body, declared_charset(record.http_headers.get("Content-Type"))).text
            if len(re.findall(r"[\u4e00-\u9fff]", text)) < 300 or re.search(r"[\u3041-\u30fa]{3}", text):
                continue
            tree = html.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
            for element in tree.xpath("//script|//style|//noscript"):
                element.drop_tree()
            yield url, tree


def _link_blocks(tree: html.HtmlElement) -> Iterator[list[str]]:
    """Texts of the links of blocks that are hardly anything but links."""
    seen: set[tuple[str, ...]] = set()
    for block in tree.xpath("//ul|//nav|//dl|//table|//div[not(.//div)]"):
        links = [" ".join(link.text_content().split()) for link in block.xpath(".//a")]
        links = [text for text in links if re.search(r"[\u4e00-\u9fff]", text)]
        whole = "".join(block.text_content().split())
        if len(links) >= 5 and sum(len(text.replace(" ", "")) for text in links) > 0.7 * len(whole) and tuple(links) not in seen:
            seen.add(tuple(links))
            yield links


def from_pages() -> Iterator[dict[str, str]]:
    """Menus and lists of links of the data pack's news and portal pages, a few lines of each; for tests in house only."""
    draw = random.Random(17)
    known: set[str] = set()
    for url, tree in _pages():
        menu: list[str] = []
        links: list[str] = []
        for block in _link_blocks(tree):
            mean = sum(map(len, block)) / len(block)
            (menu if mean <= 6 else links).extend(block[:20])
        for kind, items, most in (("menu", menu, _MENU_CHARACTERS), ("links", links, _LINK_CHARACTERS)):
            items = list(dict.fromkeys(items))
            taken = [item for item, size in zip(items, itertools.accumulate(map(len, items)), strict=True) if size <= most]
            text = draw.choice(["\n", "\n", " ", " | "] if kind == "menu" else ["\n", "\n", "\n· "]).join(taken)
            if len(taken) >= 8 and text[:40] not in known:
                known.add(text[:40])
                yield {"kind": kind, "text": text, "source": url, "license": _PAGE}


def _help_pages() -> Iterator[dict[str, str]]:
    """Menus, lists of links and indexes of real, freely licensed help pages (examples/data/quality_bad.jsonl)."""
    for line in EXAMPLES.read_text("utf-8").split("\n"):
        row = json.loads(line) if line else {}
        if row.get("language") == "zh" and row["source"] in ("menu", "links", "index"):
            source = f"{row['attribution']} (examples/data/quality_bad.jsonl {row['id']})"
            yield {"kind": row["source"], "text": row["text"], "source": source, "license": row["license"]}


def _written(draw: random.Random) -> Iterator[dict[str, str]]:
    for number, menu in enumerate(MENUS):
        for separator in ("\n", " ", " | "):
            items = menu.split(" ")
            yield {"kind": "menu", "text": separator.join(items), "source": f"written, menu {number}", "license": _OWN}
    for number in range(25):
        pairs = [f"{product}{attribute}" for product in draw.sample(PRODUCTS, 5) for attribute in draw.sample(ATTRIBUTES, 9)]
        draw.shuffle(pairs)
        text = SEPARATORS[number % len(SEPARATORS)].join(pairs)
        yield {"kind": "keywords", "text": text, "source": "written, products and attributes", "license": _OWN}
    for number in range(25):
        city, service = CITIES[number % len(CITIES)], SERVICES[number % len(SERVICES)]
        others = draw.sample(CITIES, 4) if number % 2 else [city] * 4
        lines = [draw.choice(STUFFING).format(c=each, s=service) for each in others for _ in range(2)]
        yield {"kind": "stuffing", "text": "\n".join(lines), "source": "written, cities and services", "license": _OWN}
    for number in range(28):
        sentences = draw.sample(ADVERTISEMENTS, 1 + number % 3)
        repeated = [sentence for _ in range(4 + number % 5) for sentence in sentences]
        text = ("\n" if number % 2 else "").join(repeated)
        yield {"kind": "advertising", "text": text, "source": "written, advertisements", "license": _OWN}


def _garbled(draw: random.Random) -> Iterator[dict[str, str]]:
    """Real prose of LibreOffice's help, damaged the ways that pages are."""
    rows = pq.read_table(PACK / "corpus" / "zh.parquet", columns=["text", "source", "license"]).to_pylist()
    prose = [
        (re.sub(r"\s*\n\s*", "\n", row["text"])[:700], row["source"].split("/")[-1])
        for row in rows
        if row["source"].startswith("libreoffice_help libreoffice-help-zh-cn")
        and len(re.findall(r"[\u4e00-\u9fff]", row["text"])) > 450
    ]
    ways = {
        "UTF-8 read as GBK": lambda text: text.encode("utf-8").decode("gb18030", "replace"),
        "UTF-8 read as Windows-1252": lambda text: text.encode("utf-8").decode("cp1252", "replace"),
        "UTF-8 read as Latin-1": lambda text: text.encode("utf-8").decode("latin-1"),
        "GBK read as Latin-1": lambda text: text.encode("gb18030").decode("latin-1"),
        "GBK read as UTF-8": lambda text: text.encode("gb18030").decode("utf-8", "replace"),
        "GBK read as Big5": lambda text: text.encode("gb18030").decode("big5", "replace"),
        "every third character lost": lambda text: "".join("\ufffd" if i % 3 == 2 else c for i, c in enumerate(text)),
        "question marks": lambda text: text.encode("ascii", "replace").decode("ascii"),
        "one byte lost in GBK": lambda text: (text.encode("gb18030")[1:]).decode("gb18030", "replace"),
    }
    chosen = draw.sample(prose, 5 * len(ways))
    for number, (text, source) in enumerate(chosen):
        way = list(ways)[number % len(ways)]
        if way == "one byte lost in GBK":
            text = "".join(re.findall(r"[\u4e00-\u9fff]", text))  # no mark puts the pairs of bytes right again
        yield {
            "kind": "garbled",
            "text": ways[way](text)[:900],
            "source": f"LibreOffice help {source}, {way}",
            "license": "MPL-2.0",
        }


def main() -> None:
    draw = random.Random(17)
    rows = [*_help_pages(), *_written(draw), *_garbled(draw)]
    numbered = [{"id": f"bad-{number:03d}", **row} for number, row in enumerate(rows)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in numbered)
    (HERE / "bad_chinese.jsonl").write_text(lines, "utf-8")
    print(len(rows), "rows")


if __name__ == "__main__":
    main()
