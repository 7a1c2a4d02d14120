"""The stages of a recipe that cut repeated text out of documents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from operators.dedup.lines import LineOptions, run_lines
from operators.dedup.substring import SubstringOptions, run_substring
from operators.stage import Stage, StageContext


class LineDedupStage(LineOptions, Stage):
    """Cuts lines or paragraphs that earlier documents hold already (CCNet), over all its inputs.

    Writes new parts. Every cut is listed in `cut/*.parquet` with the document that keeps the first occurrence; a document
    that is left too short goes to the rejects, uncut.
    """

    kind: Literal["line_dedup"] = "line_dedup"
    input: str | list[str] = Field(description="stage or stages whose documents are compared with each other, in this order")

    def input_names(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def run(self, context: StageContext) -> None:
        options = LineOptions.model_validate(self.model_dump(include=set(LineOptions.model_fields)))
        run_lines(context, options, [context.inputs[name] for name in self.input_names()])


class SubstringDedupStage(SubstringOptions, Stage):
    """Cuts spans of at least N tokens that occurred before anywhere in its inputs (Lee et al. 2021), all but the first.

    Writes new parts. Every cut is listed in `cut/*.parquet` with the document of the first occurrence; a document that is
    left too short goes to the rejects, uncut. Chinese and other unspaced text counts by characters.
    """

    kind: Literal["substring_dedup"] = "substring_dedup"
    input: str | list[str] = Field(description="stage or stages whose documents are compared with each other, in this order")

    def input_names(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def run(self, context: StageContext) -> None:
        options = SubstringOptions.model_validate(self.model_dump(include=set(SubstringOptions.model_fields)))
        run_substring(context, options, [context.inputs[name] for name in self.input_names()])
