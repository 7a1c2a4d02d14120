"""What `danlu plan` says, in English and Chinese."""

from __future__ import annotations

from typing import Any, Literal

from cluster.plan import Warned

Language = Literal["en", "zh"]

TITLES: dict[str, tuple[str, str]] = {
    "stage": ("stage", "阶段"),
    "kind": ("kind", "类型"),
    "rows": ("rows out", "输出行数"),
    "units": ("units", "单元数"),
    "at_once": ("at once", "并行"),
    "task": ("a task: CPU GPU memory", "每任务：CPU GPU 内存"),
    "shuffled": ("shuffled", "交换数据"),
    "disk": ("disk", "磁盘"),
    "tokens": ("tokens", "词元"),
    "time": ("time", "时间"),
}

WORDS: dict[str, tuple[str, str]] = {
    "total": ("in all: {time}, {disk} on disk at the end, {peak} at the most", "合计：{time}，结束时占用磁盘 {disk}，峰值 {peak}"),
    "total_partly": (
        "in all, without the stages of unknown duration: {time}, {disk} on disk at the end, {peak} at the most",
        "合计（不含时间未知的阶段）：{time}，结束时占用磁盘 {disk}，峰值 {peak}",
    ),
    "cluster": (
        "{name}: {nodes} nodes, {cores} cores, {gpus} GPUs; runs on {storage} storage",
        "{name}：{nodes} 个节点，{cores} 个核，{gpus} 块 GPU；运行目录位于{storage}",
    ),
    "command": ("run it with: --workers {workers}", "运行时请加：--workers {workers}"),
    "command_train": (
        "run it with: --workers {workers} --train-workers {train}",
        "运行时请加：--workers {workers} --train-workers {train}",
    ),
    "rates": ("rates: {machine}, {date} ({command})", "速率来自：{machine}，{date}（{command}）"),
    "own_rates": (
        "these are not from your machine: `danlu rates --out rates.yaml` measures it in about a minute; then --rates rates.yaml",
        "这些速率并非在您的机器上测得：`danlu rates --out rates.yaml` 约一分钟即可测量，然后使用 --rates rates.yaml",
    ),
    "assumed": ("assumed", "假设值"),
    "measured": ("from earlier runs", "取自以往运行"),
    "done": ("done", "已完成"),
    "unknown": ("?", "?"),
    "warnings": ("warnings", "警告"),
    "no_warnings": ("nothing that would not fit", "没有放不下的部分"),
    "local": ("local", "本地磁盘"),
    "shared": ("shared", "共享目录"),
    "object_store": ("object", "对象存储"),
}

WARNINGS: dict[str, tuple[str, str]] = {
    "unknown": ("no estimate: {why}", "无法估计：{why}"),
    "needs_gpu": (
        "{phase} needs GPUs, and the cluster has none: choose another cluster, or a setting that runs on CPU",
        "{phase} 需要 GPU，而该集群没有：请换用其他集群，或改用可在 CPU 上运行的设置",
    ),
    "last_step": (
        "the step `{phase}` is one task and needs {needs}, a node has {has} for tasks: give the cluster one node with more memory, "
        "or deduplicate in batches against a kept index (`index:`)",
        "步骤 `{phase}` 是单个任务，需要 {needs}，而节点可用内存为 {has}：请加入一台内存更大的节点，"
        "或用保留索引（`index:`）分批去重",
    ),
    "task_memory": (
        "a task of `{phase}` needs {needs}, a node has {has} for tasks: more partitions or smaller units (`partitions`, "
        "`read.max_unit_bytes`), or nodes with more memory",
        "`{phase}` 的单个任务需要 {needs}，节点可用内存为 {has}：请增加分区或减小单元（`partitions`、"
        "`read.max_unit_bytes`），或换内存更大的节点",
    ),
    "few_units": (
        "{units} units for {cores} cores: the others idle. More, smaller files, or a smaller `read.max_unit_bytes` where files can "
        "be cut (compressed ones cannot)",
        "{cores} 个核只有 {units} 个单元，其余空闲。请使用更多更小的文件，或在文件可切分时减小 "
        "`read.max_unit_bytes`（压缩文件不可切分）",
    ),
    "memory_limits": (
        "memory lets {at_once} tasks of `{phase}` ({needs} each) run at once on {cores} cores",
        "受内存限制，{cores} 个核上只能同时运行 {at_once} 个 `{phase}` 任务（每个 {needs}）",
    ),
    "cpu_training": (
        "training on CPU takes {days} days: use GPUs, a smaller model or fewer tokens",
        "在 CPU 上训练需要 {days} 天：请使用 GPU、更小的模型或更少的词元",
    ),
    "no_layout": (
        "tensor {tensor} and a batch of {batch} have no layout on {gpus} GPUs: lower `tensor`",
        "tensor {tensor}、批大小 {batch} 在 {gpus} 块 GPU 上没有可行布局：请减小 `tensor`",
    ),
    "model_too_large": (
        "the model needs {needs} a GPU under {layout}, which has {has}. It would fit with {fits} on {gpus} GPUs",
        "在 {layout} 下每块 GPU 需要 {needs}，而只有 {has}。改用 {fits} 和 {gpus} 块 GPU 可以放下",
    ),
    "model_fits_nowhere": (
        "the model needs {needs} under {layout}, {has} are there, and no layout on this cluster fits: more or larger GPUs, a "
        "smaller model, LoRA, or a smaller micro-batch",
        "在 {layout} 下需要 {needs}，只有 {has}，且该集群上没有放得下的布局：请使用更多或更大的 GPU、"
        "更小的模型、LoRA，或减小微批次",
    ),
    "idle_gpus": (
        "a batch of {batch} rows divides among {used} of {available} GPUs, and a run on all of them would be refused: set the "
        "batch to a multiple of the GPUs, or --train-workers {used}",
        "批大小 {batch} 只能分给 {available} 块 GPU 中的 {used} 块，用全部 GPU 运行会被拒绝："
        "请将批大小设为 GPU 数的倍数，或用 --train-workers {used}",
    ),
    "network_leaves_out": (
        "on more than {used} of {available} GPUs the exchange of gradients would cost more than it saves: a larger batch than "
        "{batch}, a faster network, or --train-workers {used}",
        "超过 {available} 块 GPU 中的 {used} 块后，梯度交换的开销大于收益：请使用大于 {batch} 的批次、更快的网络，"
        "或 --train-workers {used}",
    ),
    "network_bound": (
        "exchanging gradients takes longer than computing them: a larger batch or a faster network would help",
        "梯度交换慢于计算：增大批次或使用更快的网络会有帮助",
    ),
    "engine_gpus": (
        "an engine with tensor_parallel {tensor} finds {gpus} GPUs",
        "tensor_parallel 为 {tensor} 的引擎只有 {gpus} 块 GPU 可用",
    ),
    "engine_too_large": (
        "the generating model needs {needs} a GPU with tensor_parallel {tensor}, and may take {has}: set "
        "generator.tensor_parallel: {fits}",
        "tensor_parallel 为 {tensor} 时生成模型每块 GPU 需要 {needs}，可用 {has}：请设置 generator.tensor_parallel: {fits}",
    ),
    "engine_fits_nowhere": (
        "the generating model needs {needs}, {has} are there, and eight of these GPUs are too few: a smaller model, or an endpoint",
        "生成模型需要 {needs}，只有 {has}，八块这样的 GPU 也不够：请使用更小的模型或外部服务",
    ),
    "idle_engines": (
        "generation uses {used} of {available} GPUs: set generator.replicas: {replicas}",
        "生成只用了 {available} 块 GPU 中的 {used} 块：请设置 generator.replicas: {replicas}",
    ),
    "disk": (
        "the run takes up to {needs} where {has} are free",
        "运行最多需要磁盘 {needs}，而可用空间为 {has}",
    ),
    "runs_local": (
        "{nodes} nodes, but the runs lie on one node's disk, which the others do not see: --runs s3://... or a shared folder",
        "共有 {nodes} 个节点，但运行目录位于其中一个节点的磁盘上，其他节点看不到：请用 --runs s3://... 或共享目录",
    ),
    "node_disk": (
        "each training node keeps a copy of the packed tokens, {needs}, and nodes `{group}` have {has}",
        "每个训练节点都要保存一份打包词元的副本（{needs}），而节点组 `{group}` 只有 {has}",
    ),
}

REASONS: dict[str, tuple[str, str]] = {
    "input": ("the size of its input is unknown", "输入大小未知"),
    "files": ("{rest}", "{rest}"),
    "format": (
        "rows of these formats cannot be counted from the beginnings of files ({rest})",
        "无法从文件开头推算这些格式的行数（{rest}）",
    ),
    "model": ("no config.json tells the size of the model {rest}", "没有 config.json 说明模型 {rest} 的大小"),
    "endpoint": (
        "the duration depends on the server it asks; its tokens are in the table", "时间取决于所请求的服务器；词元数见表"
    ),
    "kind": ("a stage of one's own ({rest}), of which nothing is known", "自定义阶段（{rest}），没有可用信息"),
}  # fmt: skip

NUMBERS = {"days": "{:,.1f}"}


def word(code: str, language: Language, **facts: Any) -> str:
    """One of WORDS or TITLES."""
    return {**WORDS, **TITLES}[code][language == "zh"].format(**facts)


def told(warned: Warned, language: Language) -> str:
    """A warning as a line, the stage first."""
    facts = {key: _shown(key, value, language) for key, value in warned.facts.items()}
    text = WARNINGS[warned.code][language == "zh"].format(**facts)
    return f"stages.{warned.stage}: {text}" if warned.stage else text


def _shown(key: str, value: Any, language: Language) -> str:
    if key == "why":
        code, _, rest = str(value).partition(": ")
        return REASONS[code][language == "zh"].format(rest=rest)
    if key in ("needs", "has"):
        return size(value)
    if key in NUMBERS:
        return NUMBERS[key].format(value)
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


def size(value: float | None) -> str:
    """Bytes in decimal units with two or three digits."""
    if value is None:
        return "?"
    for unit, step in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= step:
            scaled = value / step
            return f"{scaled:,.0f} {unit}" if scaled >= 100 else f"{scaled:,.1f} {unit}"
    return f"{value:,.0f} B"


def many(value: float | None) -> str:
    """A count in short: 12,345, 1.2M, 3.4G."""
    if value is None:
        return "?"
    for unit, step in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= step:
            return f"{value / step:,.1f}{unit}"
    return f"{value:,.0f}"


def span(seconds: float | None, language: Language) -> str:
    """A duration in the largest unit that leaves two digits."""
    if seconds is None:
        return "?"
    for step, (english, chinese) in ((172_800, ("days", "天")), (7200, ("h", "小时")), (120, ("min", "分钟"))):
        if seconds >= step:
            scaled = seconds / {172_800: 86_400, 7200: 3600, 120: 60}[step]
            return f"{scaled:,.1f} {chinese if language == 'zh' else english}"
    return f"{seconds:,.0f} {'秒' if language == 'zh' else 's'}"
