"""The data card of a mixture, in English and in Chinese: what was asked for, what was reached, and what the rows are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import Field

from cluster import storage
from operators.config import Settings
from operators.sampling.keys import Order
from operators.sinks import card
from operators.stage import StageContext

_SHOWN = 50
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*\Z")
_FILES = ("README.md", "README.zh-CN.md")


class CardSettings(Settings):
    """What a data card says that nothing can be counted for. A change here writes no new card for a finished stage."""

    title: str | None = Field(default=None, description="title; default: the stage's name")
    description: str = Field(default="", description="what the mixture is for (Markdown), in either language")
    license: str | None = Field(
        default=None, description="licence of the whole mixture, as Hugging Face spells it (`cc-by-sa-4.0`)"
    )
    licenses: dict[str, str] = Field(default_factory=dict, description="licence of the rows of each input stage")


_WORDS: dict[str, tuple[str, str]] = {
    "other": ("中文说明：[README.zh-CN.md](README.zh-CN.md)", "English: [README.md](README.md)"),
    "mixture": ("Mixture", "配比"),
    "lede": (
        "Shares of {unit}, drawn with seed {seed}: rows are left out, or repeated, by a seeded hash of their id.",
        "按{unit}计的占比，随机种子 {seed}：按行 id 的带种子哈希决定保留、舍弃或重复哪些行。",
    ),
    "line": ("along", "维度"), "value": ("value", "取值"), "target": ("target", "目标"), "reached": ("reached", "实际"),
    "error": ("difference", "偏差"), "rows": ("rows", "行数"), "size": ("{unit}", "{unit}"), "there": ("rows there", "原有行数"),
    "repeats": ("each row taken", "每行取用次数"), "group": ("group", "组"), "groups": ("Groups", "各组"),
    "inputs": ("Input stages", "输入阶段"), "license": ("licence", "许可证"), "unknown": ("(unknown)", "（未知）"),
    "languages": ("Languages", "语言"), "generators": ("Generators", "生成模型"), "operations": ("Operations", "生成方法"),
    "sources": ("Sources", "来源"), "licenses": ("Licences", "许可证"), "turns": ("Turns", "轮次"),
    "lengths": ("Lengths", "长度"), "up_to": ("{unit} a row, up to", "每行{unit}，至多"), "share": ("share", "占比"),
    "refusals": ("Refusals", "拒答"),
    "refusing": (
        "{refusals} of {answered} rows with a reply refuse ({share}); {unknown} say honestly that they do not know ({honest}).",
        "在 {answered} 行有回复的数据中，{refusals} 行拒答（{share}）；{unknown} 行如实表示不知道（{honest}）。",
    ),
    "made": ("How it was made", "制作过程"),
    "counted_all": ("all messages", "全部消息"), "counted_replies": ("the assistant's replies only", "仅助手回复"),
    "measured": ("Sizes count {counted}, without a chat template.", "大小按{counted}统计，不含对话模板。"),
    "estimate": (
        "Tokens are an estimate from lengths (4 ASCII characters, or 1.4 others, are one).",
        "词元数为按长度的估计（4 个 ASCII 字符或 1.4 个其他字符计为一个）。",
    ),
    "others": ("{n} others", "其余 {n} 项"),
    "lineage": (
        "The stages that the rows went through and all their settings are listed in [README.md](README.md).",
        "各行所经过的阶段及其全部设置见 [README.md](README.md)。",
    ),
    "unit.documents": ("rows", "行"), "unit.bytes": ("bytes", "字节"), "unit.characters": ("characters", "字符"),
    "unit.tokens": ("tokens", "词元"), "unit.estimated_tokens": ("estimated tokens", "估计词元"),
    "multi_turn": ("several turns", "多轮"), "single_turn": ("one turn", "单轮"),
}  # fmt: skip


def write_card(context: StageContext, settings: CardSettings, order: Order, stats: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """Write README.md and README.zh-CN.md into the stage's directory; the name of the first."""
    for language, name in enumerate(_FILES):
        page = render(context, settings, order, stats, language)
        lines = [page, *(["", *card.made(context, inputs)] if language == 0 else [])]
        storage.write_bytes(storage.join(context.directory, name), "\n".join(lines).encode("utf-8", "surrogatepass"))
    return _FILES[0]


def render(context: StageContext, settings: CardSettings, order: Order, stats: Mapping[str, Any], language: int) -> str:
    """The card without the stages behind it, in English (0) or Chinese (1)."""
    unit = _WORDS[f"unit.{order.unit}"][language]
    found = stats["mixture"]

    def say(key: str, **values: Any) -> str:
        return _WORDS[key][language].format(**{"unit": unit, **values})

    title = settings.title or context.stage
    lines = ["---", _front_matter(settings, title, found), "---", "", f"# {card.cell(title)}", "", say("other"), ""]
    if settings.description:
        lines += [settings.description.strip(), ""]
    counts = f"{say('rows')}: {found.get('rows', 0):,} · {unit}: {found.get('size', 0):,}"
    lines += [f"## {say('mixture')}", "", say("lede", seed=context.seed), "", counts, ""]
    heads = [say("line"), say("value"), say("target"), say("reached"), say("error"), say("rows"), say("size")]
    rows = [
        [f"`{card.cell(line)}`", _value(value, say), _percent(entry["target"]), _percent(entry["reached"]),
         f"{entry['error']:+.2%}", f"{entry['documents']:,}", f"{entry['size']:,}"]
        for line, values in stats["shares"].items()
        for value, entry in sorted(values.items(), key=lambda item: (-item[1]["target"], item[0]))
    ]  # fmt: skip
    lines += [*_table(heads, rows[: 4 * _SHOWN]), ""]
    if len(stats["shares"]) > 1 or any("repeats" in group for group in stats["groups"].values()):
        heads = [say("group"), say("there"), say("rows"), say("size"), say("repeats")]
        rows = [
            [_value(name, say), f"{group['documents']:,}", f"{group['taken']['documents']:,}", f"{group['taken']['size']:,}",
             f"{group.get('repeats', 1):g} ×"]
            for name, group in stats["groups"].items()
        ]  # fmt: skip
        lines += [f"### {say('groups')}", "", *_table(heads, rows[: 4 * _SHOWN]), ""]
    lines += [say("measured", counted=say(f"counted_{order.counted}"))]
    lines += [*([say("estimate")] if order.unit == "estimated_tokens" else []), ""]
    lines += [f"## {say('inputs')}", ""]
    given = dict.fromkeys(found.get("inputs", {}), "") | settings.licenses
    rows = [
        [
            card.cell(name),
            f"{found.get('inputs', {}).get(name, 0):,}",
            f"{found.get('inputs_size', {}).get(name, 0):,}",
            card.cell(owner),
        ]
        for name, owner in given.items()
    ]
    lines += [*_table([say("inputs"), say("rows"), say("size"), say("license")], rows), ""]
    for name in ("turns", "languages", "generators", "operations", "sources", "licenses"):
        lines += _counted(name, found, say)
    lines += _lengths(found, say)
    if found.get("answered"):
        shares = {
            "share": _percent(found["refusals"] / found["answered"]),
            "honest": _percent(found["unknown"] / found["answered"]),
        }
        values = {name: f"{found[name]:,}" for name in ("answered", "refusals", "unknown")}
        lines += [f"## {say('refusals')}", "", say("refusing", **values, **shares), ""]
    if language == 1:
        lines += [f"## {say('made')}", "", say("lineage"), ""]
    return "\n".join(lines)


def _front_matter(settings: CardSettings, title: str, found: Mapping[str, Any]) -> str:
    languages = sorted(name for name in found.get("languages", {}) if _LANGUAGE.match(name))
    values: dict[str, Any] = {"pretty_name": title, "tags": ["danlu"]}
    values |= {"language": languages} if languages else {}
    values |= {"license": settings.license} if settings.license else {}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()


def _counted(name: str, found: Mapping[str, Any], say: Any) -> list[str]:
    counts: dict[str, int] = found.get(name, {})
    if not counts:
        return []
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    total = sum(counts.values())
    sizes = found.get(f"{name}_size", {})
    rows = [
        [_value(value, say), f"{rows:,}", f"{sizes.get(value, 0):,}", _percent(rows / total)] for value, rows in ranked[:_SHOWN]
    ]
    if len(ranked) > _SHOWN:
        rest = [value for value, _ in ranked[_SHOWN:]]
        left = sum(counts[value] for value in rest)
        size = sum(sizes.get(value, 0) for value in rest)
        rows.append([say("others", n=len(rest)), f"{left:,}", f"{size:,}", _percent(left / total)])
    return [f"## {say(name)}", "", *_table([say(name), say("rows"), say("size"), say("share")], rows), ""]


def _lengths(found: Mapping[str, Any], say: Any) -> list[str]:
    counts = {int(bound): rows for bound, rows in found.get("lengths", {}).items()}
    if not counts:
        return []
    total = sum(counts.values())
    rows = [[f"{bound:,}", f"{counts[bound]:,}", _percent(counts[bound] / total)] for bound in sorted(counts)]
    return [f"## {say('lengths')}", "", *_table([say("up_to"), say("rows"), say("share")], rows), ""]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows)]


def _value(value: str, say: Any) -> str:
    """A value as it is, in words where it is one of ours; as code where it could be Markdown."""
    if value in ("multi_turn", "single_turn"):
        return f"{say(value)} (`{value}`)"
    if value == "":
        return str(say("unknown"))
    return card.cell(value) if re.fullmatch(r"[\w .:/|@-]*", value) else f"`{card.cell(json.dumps(value, ensure_ascii=False))}`"


def _percent(share: float) -> str:
    return f"{share:.2%}"
