"""The operators a recipe may name, and how a name becomes an operator. Modules load when first used."""

from __future__ import annotations

from typing import Any

from operators.config import SettingsError, import_class, nearest
from operators.operator import Operator

OPERATORS: dict[str, str] = {
    "extract_html": "operators.text.html:ExtractHtml",
    "fix_text": "operators.text.repair:FixText",
    "normalise_chinese": "operators.text.chinese:NormaliseChinese",
    "strip_markdown": "operators.text.markdown:StripMarkdown",
    "strip_latex": "operators.text.latex:StripLatex",
    "strip_boilerplate": "operators.text.boilerplate:StripBoilerplate",
    "detect_language": "operators.text.language:DetectLanguage",
    "chinese_script": "operators.text.chinese_script:ChineseScript",
    "language_share": "operators.text.language_share:LanguageShare",
    "gopher_quality": "operators.filters.gopher_quality:GopherQuality",
    "gopher_repetition": "operators.filters.gopher_repetition:GopherRepetition",
    "c4_quality": "operators.filters.c4:C4Quality",
    "fineweb_quality": "operators.filters.fineweb:FineWebQuality",
    "filter_lengths": "operators.filters.lengths:FilterLengths",
    "filter_perplexity": "operators.filters.perplexity:FilterPerplexity",
    "filter_expression": "operators.filters.expression:FilterExpression",
    "filter_ratios": "operators.filters.lengths:FilterRatios",
    "filter_urls": "operators.filters.urls:FilterUrls",
    "bad_words": "operators.filters.badwords:BadWords",
    "decontaminate": "operators.decontaminate.operator:Decontaminate",
    "redact_pii": "operators.text.pii:RedactPii",
    "score_quality": "operators.quality.scorer:ScoreQuality",
    "vague_reference": "operators.synthesis.curate.vague_reference:VagueReference",
    "time_sensitive": "operators.synthesis.curate.time_sensitive:TimeSensitive",
    "malformed_reply": "operators.synthesis.curate.malformed:MalformedReply",
    "unsupported_numbers": "operators.synthesis.curate.unsupported_numbers:UnsupportedNumbers",
    "stock_phrases": "operators.synthesis.curate.stock_phrases:StockPhrases",
    "illegal_keywords": "operators.synthesis.curate.illegal_keywords:IllegalKeywords",
    "garbled_reply": "operators.synthesis.curate.garble:GarbledReply",
    "token_length": "operators.synthesis.curate.token_length:TokenLength",
    "instruction_difficulty": "operators.synthesis.curate.difficulty:InstructionDifficulty",
    "refusal_share": "operators.synthesis.curate.refusals:RefusalShare",
    "opening_diversity": "operators.synthesis.curate.openings:OpeningDiversity",
    "contradictions": "operators.synthesis.curate.contradictions:Contradictions",
    "near_repeats": "operators.synthesis.curate.repeats:NearRepeats",
    "reply_repeats": "operators.synthesis.curate.repeats:ReplyRepeats",
}


def load(name: str) -> type[Operator]:
    """The class behind a registered name or an import path `package.module:Class`.

    Raises SettingsError when there is no such operator or the path does not lead to one.
    """
    path = OPERATORS.get(name, name)
    if ":" not in path:
        raise SettingsError(f"unknown operator {name!r}{nearest(name, list(OPERATORS))} (or an import path 'package.module:Class')")
    return import_class(path, Operator, f"operator {name!r}")


def build(entry: str | dict[str, Any]) -> Operator:
    """An operator from its recipe entry: `name` or `{name: {option: value}}`. Raises SettingsError."""
    name, options = split(entry)
    return load(name)(**options)


def split(entry: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, options) of a recipe entry. Raises SettingsError when it has another shape."""
    if isinstance(entry, str):
        return entry, {}
    if len(entry) != 1:
        raise SettingsError(f"an operator is 'name' or '{{name: {{option: value}}}}', got keys {list(entry)}")
    name, options = next(iter(entry.items()))
    if options is not None and not isinstance(options, dict):
        raise SettingsError(f"options of operator {name!r} must be a mapping, got {options!r}")
    return name, dict(options or {})
