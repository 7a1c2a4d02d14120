"""What each rule says: evidence, reason, source and remedy, each text in English and Chinese.

Braces are facts that the rule fills in; the formats stand here, so that both languages show a number alike.
"""

from __future__ import annotations

from dataclasses import dataclass

Both = tuple[str, str]


@dataclass(frozen=True)
class Rule:
    """The texts of one rule, (English, Chinese) each; `source` is where the reason is shown."""

    evidence: Both
    reason: Both
    remedy: Both
    source: str = ""


RULES: dict[str, Rule] = {
    # what is trained on
    "no_general_data": Rule(
        ("trains {model} on one source, {input}", "仅用一个来源 {input} 训练 {model}"),
        ("without a share of what it knew a model forgets it", "不混入原有知识的数据，模型会遗忘"),
        (
            "mix in 5 to 10% of general conversations or documents (input: {{{input}: 0.9, general: 0.1}}), or set `ewc`",
            "混入 5% 到 10% 的通用对话或文档（input: {{{input}: 0.9, general: 0.1}}），或设置 `ewc`",
        ),
        "Scialom et al. 2022; Ibrahim et al. 2024",
    ),
    "little_general_data": Rule(
        ("the smallest share of the mixture, {input}, is {share:.1%}", "混合中最小的一份 {input} 只占 {share:.1%}"),
        ("too little to rehearse with", "不足以起到复习作用"),
        ("raise it to 5% or more", "提高到 5% 以上"),
        "Ibrahim et al. 2024",
    ),
    "refusals": Rule(
        (
            "{share:.1%} of {rows:,} replies looked at in {input} refuse ({examples})",
            "{input} 中检查的 {rows:,} 条回复有 {share:.1%} 是拒答（{examples}）",
        ),
        ("a model learns to refuse harmless questions from few examples", "少量拒答样本就会让模型拒绝无害的问题"),
        ("put a `curate` stage with `refusal_share` before it", "在其前加入带 `refusal_share` 的 `curate` 阶段"),
        "Röttger et al. 2023 (XSTest); Bianchi et al. 2023",
    ),
    "openings": Rule(
        (
            "{share:.1%} of {rows:,} replies looked at in {input} begin with “{opening}”",
            "{input} 中检查的 {rows:,} 条回复有 {share:.1%} 以“{opening}”开头",
        ),
        ("a model parrots what most of its examples say alike", "样本千篇一律，模型就会照搬"),
        (
            "add `stock_phrases`, `reply_repeats` or `opening_diversity` to a `curate` stage",
            "在 `curate` 阶段加入 `stock_phrases`、`reply_repeats` 或 `opening_diversity`",
        ),
        "Zhou et al. 2023 (LIMA, section 5)",
    ),
    "uncurated": Rule(
        (
            "trains on rows that a model wrote and no `curate` stage has looked at ({input})",
            "训练数据 {input} 由模型生成，未经 `curate` 阶段检查",
        ),
        ("errors, refusals and stock phrases of the generator are learnt with the rest", "生成模型的错误、拒答和套话会一并学到"),
        ("put a `curate` stage between", "在两者之间加入 `curate` 阶段"),
        "Wang et al. 2023 (Self-Instruct, section 3)",
    ),
    "evaluated_on_training_data": Rule(
        ("{evaluate} measures on {shared}, which {stage} trains on", "{evaluate} 用 {shared} 评测，而 {stage} 用它训练"),
        ("what is measured is memory, not ability", "测到的是记忆而非能力"),
        (
            "hold rows out (`held_out`, a pack's `holdout`), or measure on other files",
            "留出数据（`held_out` 或 pack 的 `holdout`），或换用其他文件评测",
        ),
        "Sainz et al. 2023",
    ),
    "repeats": Rule(
        ("no dedup stage before {input} is packed", "{input} 打包前没有去重阶段"),
        ("repeated documents cost steps and are memorised", "重复文档浪费训练步数并被死记"),
        ("add a `dedup` stage", "加入 `dedup` 阶段"),
        "Lee et al. 2021",
    ),
    "nothing_held_out": Rule(
        ("holds out no documents", "没有留出文档"),
        ("perplexity would be measured on text the model was trained on", "困惑度将在训练过的文本上测得"),
        ("set `holdout`, to 0.02 say", "设置 `holdout`，例如 0.02"),
    ),
    "language_after_filters": Rule(
        ("{filter} has thresholds for each language, but {where}", "{filter} 的阈值按语言而定，但{where_zh}"),
        ("text of one language is judged by the rules of another", "文本会按另一种语言的规则评判"),
        ("put `detect_language` before {filter}", "把 `detect_language` 放在 {filter} 之前"),
    ),
    "no_token_cap": Rule(
        ("asks a server without `max_generated_tokens`", "调用服务器而未设 `max_generated_tokens`"),
        ("a mistake in the recipe would be paid for in full", "配方写错也要全额付费"),
        ("set `max_generated_tokens`", "设置 `max_generated_tokens`"),
    ),
    # how it is trained
    "learning_rate": Rule(
        (
            "learning rate {rate:g} is above {bound:g}, for {how} of a model of {parameters:.3g} parameters",
            "学习率 {rate:g} 高于 {bound:g}（{parameters:.3g} 参数的模型，{how_zh}）",
        ),
        ("the higher the rate, the more is forgotten", "学习率越高，遗忘越多"),
        ("lower it to {bound:g} or less", "降到 {bound:g} 或以下"),
        "{source}",
    ),
    "epochs": Rule(
        (
            "sees each row of {input} {epochs:.1f} times ({samples:,.0f} samples of {rows:,} rows{basis})",
            "{input} 的每一行将被训练 {epochs:.1f} 遍（{rows:,} 行取样 {samples:,.0f} 次{basis_zh}）",
        ),
        (
            "beyond about {bound:g} passes repeated data brings little and is memorised",
            "超过约 {bound:g} 遍后重复数据收益很小，且被死记",
        ),
        ("take fewer steps, more rows, or `held_out` with `patience`", "减少步数、增加数据，或设置 `held_out` 与 `patience`"),
        "Muennighoff et al. 2023",
    ),
    "no_warmup": Rule(
        ("{steps} of {total} steps of warm-up", "{total} 步中预热 {steps} 步"),
        ("the first steps of Adam, with moments unsettled, move a trained model far", "Adam 起初的动量未稳定，会把模型带偏很远"),
        ("set `schedule.warmup` to 0.03 to 0.1", "把 `schedule.warmup` 设为 0.03 到 0.1"),
        "Goyal et al. 2017; Ibrahim et al. 2024",
    ),
    "lora_targets": Rule(
        ("adapters on {targets} alone", "适配器只加在 {targets} 上"),
        ("adapters on few modules fall short of full fine-tuning at any rank", "只在少数模块上加适配器，秩再高也不及全参数微调"),
        ("set `lora.targets: all-linear`", "设置 `lora.targets: all-linear`"),
        "Dettmers et al. 2023 (QLoRA, section 4); Biderman et al. 2024",
    ),
    "packing_not_isolated": Rule(
        ("packs examples for a model of type {type}", "为 {type} 类型的模型打包样本"),
        ("its recurrent layers carry the state of one example into the next", "它的循环层会把前一个样本的状态带入下一个"),
        ("leave `packing` out", "不要使用 `packing`"),
        "Ding et al. 2024 (section 2)",
    ),
    "template": Rule(
        ("{found}, but {wanted} is asked for", "{found}，而配方要求 {wanted}"),
        ("turns are marked by strings that the model has never seen as marks", "对话将用模型从未见过的标记来分隔"),
        ("leave `chat_template` out, or keep to one through all stages", "去掉 `chat_template`，或在各阶段保持一致"),
        "Jiang et al. 2024 (ChatBug)",
    ),
    "batch": Rule(
        ("a global batch of {batch} does not divide among {workers} workers", "全局批量 {batch} 不能被 {workers} 个训练进程整除"),
        ("the stage will refuse to start", "该阶段将拒绝启动"),
        ("use one of {divisors} workers, or another batch", "使用 {divisors} 个进程之一，或更改批量"),
    ),
    # the chain
    "aligned_without_sft": Rule(
        ("aligns {model}, which never saw supervised fine-tuning", "直接对齐未经监督微调的 {model}"),
        (
            "preferences and rewards choose among replies; a base model writes none worth choosing",
            "偏好和奖励是在回复之间做选择，而基座模型写不出可选的回复",
        ),
        ("put an `sft` stage before it", "在其前加入 `sft` 阶段"),
        "Rafailov et al. 2023 (section 4)",
    ),
    "unmeasured": Rule(
        (
            "has no general set to be scored on before and after, and no evaluate stage measures it",
            "没有可在训练前后评分的通用集合，也没有 evaluate 阶段评测它",
        ),
        ("what it forgot stays unknown", "遗忘了什么无从得知"),
        (
            "mark an input `general: true`, name a set under `evaluate.general`, or name the model in the `models` of an "
            "`evaluate` stage, beside the one it started from",
            "给某个输入标上 `general: true`，在 `evaluate.general` 下写明集合，或把它与起始模型一起写进 `evaluate` 阶段的 `models`",
        ),
        "Luo et al. 2023",
    ),
    "before_unmeasured": Rule(
        ("{evaluate} measures it, but not {model}, from which it started", "{evaluate} 评测了它，却没有评测起始模型 {model}"),
        (
            "without the score before, a loss cannot be told from what was never there",
            "没有训练前的分数，就分不清是遗忘还是本来不会",
        ),
        ("add {model} to `models` of {evaluate}", "把 {model} 加入 {evaluate} 的 `models`"),
        "Luo et al. 2023",
    ),
    "rewards_all_zero": Rule(
        ("in its last run reward {reward} was {value:g} for every reply", "上次运行中奖励 {reward} 对所有回复都是 {value:g}"),
        ("where all replies of a group score alike there is nothing to learn from", "同组回复得分相同，就没有可学的信号"),
        (
            "start from a model that sometimes succeeds, or reward a step towards it (format)",
            "从有时能成功的模型开始，或先奖励格式等中间目标",
        ),
        "Shao et al. 2024 (GRPO)",
    ),
}
