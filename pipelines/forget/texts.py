"""What `danlu forget` says, in English and Chinese."""

from __future__ import annotations

from typing import Any, Literal

TEXTS: dict[str, tuple[str, str]] = {
    "resumed": (
        "an interrupted takedown of {time} was finished first",
        "先完成了 {time} 被中断的删除",
    ),
    "did": (
        "forgot {rows:,} rows of {ids:,} ids and of {descendants:,} rows made from them",
        "已删除 {rows:,} 行：{ids:,} 个 id，以及由其生成的 {descendants:,} 行",
    ),
    "would": (
        "would forget {rows:,} rows of {ids:,} ids and of {descendants:,} rows made from them",
        "将删除 {rows:,} 行：{ids:,} 个 id，以及由其生成的 {descendants:,} 行",
    ),
    "folder.parts": ("rows", "行"),
    "folder.data": ("exported rows", "导出的行"),
    "folder.rejects": ("rejected rows", "剔除的行"),
    "folder.removed": ("records of duplicates", "重复记录"),
    "folder.cut": ("cut spans", "裁去的片段"),
    "folder.tasks": ("tasks", "任务"),
    "folder.rewrites": ("rewrites", "改写"),
    "reset": (
        "{stage} had read it: the next `danlu run` begins it anew",
        "{stage} 已读过它：下次 `danlu run` 将重新开始该阶段",
    ),
    "replies": (
        "removed {removed:,} cached replies that share {bytes} bytes with it; of the {left:,} others some may paraphrase it",
        "已删除 {removed:,} 条与其有 {bytes} 字节相同的缓存回复；其余 {left:,} 条中可能有转述",
    ),
    "saw": (
        "model {stage} ({kind}) saw it in {samples:,} samples, steps {first} to {last}",
        "模型 {stage}（{kind}）在 {samples:,} 个样本中见过它，第 {first} 至 {last} 步",
    ),
    "saw_rows": (
        "{stage} ({kind}) was made from {rows:,} rows of it",
        "{stage}（{kind}）由其中 {rows:,} 行训练或生成",
    ),
    "saw_through": (
        "model {stage} ({kind}) was made from {through}, which saw it",
        "模型 {stage}（{kind}）由见过它的 {through} 得来",
    ),
    "checkpoint": (
        "  {path} is from before step {step}",
        "  {path} 早于第 {step} 步",
    ),
    "weights": (
        "weights cannot be rewritten: train these again without it (docs/operations.md, Takedown)",
        "权重无法改写：请在去除它之后重新训练这些模型（见 docs/operations.md 的 Takedown）",
    ),
    "duplicates": (
        "{count:,} rows of the same or nearly the same text stay: {ids} (--with-duplicates takes them too)",
        "仍保留 {count:,} 行相同或近似的文本：{ids}（--with-duplicates 一并删除）",
    ),
    "outside.export": (
        "files below {place} were exported from it: they stay until the next `danlu run` writes them again",
        "{place} 下的导出文件含有它：下次 `danlu run` 重写之前仍在",
    ),
    "outside.index": (
        "the kept index {place} holds its id and hashes, no text: they stay",
        "保留索引 {place} 中有其 id 与哈希（无正文），不作改动",
    ),
    "outside.nodes": (
        "copies on the disks of nodes ({place}) stay until they are pushed out: remove that folder",
        "各节点磁盘上的副本（{place}）在被挤出之前仍在：请删除该目录",
    ),
    "earlier": ("{id} was forgotten before, on {time}", "{id} 已于 {time} 删除"),
    "not_found": (
        "no stage knows {id}; should a file bring it, it will be kept out",
        "没有任何阶段见过 {id}；今后若有文件带来它，将被拒收",
    ),
}


def say(key: str, language: Literal["en", "zh"], **values: Any) -> str:
    """One message. Raises KeyError for an unknown key."""
    return TEXTS[key][language == "zh"].format(**values)
