"""A finding: what was seen, why that is bad, and what to change, in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.checks.catalogue import RULES

Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Finding:
    """One doubt about one stage. `code` names the rule in the catalogue, `facts` are the numbers its texts speak of."""

    code: str
    stage: str
    facts: dict[str, Any] = field(default_factory=dict)

    def text(self, language: Language) -> dict[str, str]:
        """`evidence`, `reason` and `remedy` in a language, and `source`, the paper the reason is from (may be empty)."""
        rule, number = RULES[self.code], 0 if language == "en" else 1
        words = {"evidence": rule.evidence[number], "reason": rule.reason[number], "remedy": rule.remedy[number]}
        return {key: text.format(**self.facts) for key, text in {**words, "source": rule.source}.items()}

    def line(self, language: Language) -> str:
        """All of it in one paragraph, beginning with the stage."""
        said = self.text(language)
        source = f" [{said['source']}]" if said["source"] else ""
        stop, remedy = ("; ", "change: ") if language == "en" else ("；", "建议：")
        return f"stages.{self.stage}: {said['evidence']}{stop}{said['reason']}{source}. {remedy}{said['remedy']}"

    def as_json(self, language: Language) -> dict[str, Any]:
        return {"code": self.code, "stage": self.stage, "facts": self.facts, **self.text(language)}
