"""What `danlu diagnose` says of each symptom: its name, its remedy, its verdict and why it has none, in English and Chinese."""

from __future__ import annotations

TEXTS: dict[str, dict[str, tuple[str, str]]] = {
    "general_ability": {
        "name": ("general ability lost", "通用能力下降"),
        "remedy": (
            "mix in 5 to 10% of general data, train with LoRA or EWC, or lower the learning rate (docs/forgetting.md)",
            "混入 5% 到 10% 的通用数据，改用 LoRA 或 EWC，或降低学习率（docs/forgetting.md）",
        ),
    },
    "strangeness": {
        "name": (
            "babble: nats a token of its replies under the model before, beyond those of that one's own",
            "胡言乱语：其回复在训练前模型下的每词元奈特数，超出后者自身回复的部分",
        ),
        "remedy": (
            "lower the learning rate, train for fewer epochs, and look at the data for broken rows (curate: garbled_reply)",
            "降低学习率、减少训练轮数，并检查数据中的损坏样本（curate: garbled_reply）",
        ),
    },
    "invalid_words": {
        "name": (
            "invalid words: share of words (pairs of Chinese characters) that the training data lacks, beyond the base's own",
            "生造词：训练数据中没有的词（汉字二元组）比例，超出训练前模型的部分",
        ),
        "remedy": (
            "lower the learning rate; check that tokenizer and chat template are those of the base model",
            "降低学习率；确认分词器和对话模板与基座模型一致",
        ),
    },
    "broken_characters": {
        "name": ("replies with broken characters", "含乱码字符的回复"),
        "remedy": (
            "clean the training data (fix_text; curate: garbled_reply); let replies end at a whole character",
            "清洗训练数据（fix_text；curate: garbled_reply）；避免回复在字符中间截断",
        ),
    },
    "repetition": {
        "name": ("parroting: n-grams repeated within a reply", "复读：回复内部重复的 n 元组"),
        "remedy": (
            "train for fewer epochs, drop repeats (curate: near_repeats, garbled_reply), make sure replies end with the end token",
            "减少训练轮数，去掉近似重复样本（curate: near_repeats、garbled_reply），确认回复以结束符收尾",
        ),
    },
    "diversity": {
        "name": ("diversity: distinct pairs of words over all", "多样性：不同二元组占比"),
        "remedy": (
            "train on more varied instructions (curate: diverse_openings, near_repeats) and for fewer epochs",
            "使用更多样的指令（curate: diverse_openings、near_repeats），减少训练轮数",
        ),
    },
    "rigid_opening": {
        "name": ("replies that open alike", "开头雷同的回复"),
        "remedy": (
            "cap replies that open alike in the training data (curate: reply_repeats, stock_phrases)",
            "限制训练数据中开头雷同的回复（curate: reply_repeats、stock_phrases）",
        ),
    },
    "copied": {
        "name": ("replies copied from training rows", "照抄训练样本的回复"),
        "remedy": ("train for fewer epochs and remove duplicates from the data", "减少训练轮数，并对数据去重"),
    },
    "refusal": {
        "name": ("refusals of harmless prompts", "拒绝无害请求"),
        "remedy": (
            "keep refusals to a small share of the data (curate: refusal_share), add harmless prompts that sound harmful, answered",
            "压低数据中拒答的比例（curate: refusal_share），加入听起来敏感但无害且得到回答的样本",
        ),
    },
    "format_json": {
        "name": ("valid JSON where JSON alone was asked for", "只要求 JSON 时的有效率"),
        "remedy": (
            "add rows whose replies are JSON alone; reward the form (grpo, check: json), or decode under a grammar",
            "加入回复仅为 JSON 的样本；以格式作奖励（grpo，check: json），或按语法约束解码",
        ),
    },
    "format_xml": {
        "name": ("valid XML where XML alone was asked for", "只要求 XML 时的有效率"),
        "remedy": (
            "add rows whose replies are XML alone; reward the form (grpo, check: xml)",
            "加入回复仅为 XML 的样本；以格式作奖励（grpo，check: xml）",
        ),
    },
    "format_sql": {
        "name": ("valid SQL where SQL alone was asked for", "只要求 SQL 时的有效率"),
        "remedy": (
            "add rows whose replies are SQL alone; reward the form (grpo, check: sql)",
            "加入回复仅为 SQL 的样本；以格式作奖励（grpo，check: sql）",
        ),
    },
    "abstention": {
        "name": ("unanswerable questions that it admits not to know", "无法回答的问题中承认不知道的比例"),
        "remedy": (
            "add questions that cannot be answered, with replies that say so, to the training data (or to the chosen replies)",
            "在训练数据中加入无法回答的问题及如实说明的回复（也可作为偏好对中的优选回复）",
        ),
    },
    "adapter_capacity": {
        "name": ("adapter too small: training loss above that of full fine-tuning", "适配器过小：训练损失高于全量微调"),
        "remedy": (
            "raise `lora.rank`, set `targets: all-linear`, raise the learning rate of the adapter, or train all weights",
            "提高 `lora.rank`，设置 `targets: all-linear`，提高适配器学习率，或训练全部权重",
        ),
    },
}  # fmt: skip

VERDICTS: dict[str, tuple[str, str]] = {
    "ok": ("ok", "正常"),
    "bad": ("BAD", "异常"),
    "inherited": ("bad before", "训练前已有"),
    "unmeasured": ("not measured", "未测量"),
}

MEASURES: dict[str, tuple[str, str]] = {"accuracy": ("accuracy", "准确率"), "loss": ("nats a token", "每词元奈特数")}

NOTES: dict[str, tuple[str, str]] = {
    "no_base": ("the model was not trained from another", "该模型并非由其他模型训练而来"),
    "few_words": ("{known} words are known, {needed} are needed", "已知词 {known} 个，至少需要 {needed} 个"),
    "own_share": ("the base's own share: {share:.3g}", "训练前模型自身占比：{share:.3g}"),
    "no_template": ("the model has no chat template", "该模型没有对话模板"),
    "no_comparison": (
        "no general set was scored before and after, in training or by an evaluate stage (docs/evaluation.md)",
        "训练前后都没有在通用集合上评分，也没有 evaluate 阶段作比较（docs/evaluation.md）",
    ),
    "no_curve": ("the stage left no curve", "该阶段没有留下曲线"),
    "full_curve": (
        "rank {rank}: loss {own:.3f}; {other}, with all weights: {loss:.3f}",
        "秩 {rank}：损失 {own:.3f}；全量训练的 {other}：{loss:.3f}",
    ),
    "no_full_curve": (
        "rank {rank}, last loss {own:.3f}|; the run has no full fine-tuning of the same inputs to compare with",
        "秩 {rank}，末段损失 {own:.3f}|；本次运行没有同样输入的全量微调可比",
    ),
    "trained_from": (", trained from {base}", "（由 {base} 训练而来）"),
    "counts": (
        ": {bad} of {total} measures are bad, {inherited} more were as bad before",
        "：{total} 项中 {bad} 项异常，另有 {inherited} 项训练前已同样异常",
    ),
    "mend_before": (
        "What was bad before is mended in the model before: train that one longer, or start from a stronger one.",
        "训练前已有的问题应在训练前的模型上解决：将其训练得更久，或换用更强的基座。",
    ),
    "last_third": ("; {share:.0%} of the fall of the loss in its last third", "；损失降幅的 {share:.0%} 出现在最后三分之一"),
}
