"""Settings of the method: what is asked, for whom, and what an answer must stand up to."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from operators.config import Settings
from operators.synthesis.documents.chunks import ChunkSettings
from operators.synthesis.documents.quotas import QuotaSettings
from operators.synthesis.documents.wording import QUESTION_TYPES, Difficulty, QuestionType
from operators.synthesis.requests import SamplingSettings


class GroundingSettings(Settings):
    """What an answer must find in its chunk."""

    min_evidence: float = Field(
        default=0.75, ge=0, le=1, description="least likeness of the quoted evidence to a stretch of the chunk (1 = literal)"
    )
    min_evidence_tokens: int = Field(default=4, ge=1, description="shorter quotations prove nothing (characters in Chinese)")
    min_support: float = Field(
        default=0.4, ge=0, le=1, description="least share of the answer's words, without stop words, that stand in the chunk"
    )
    numbers: bool = Field(default=True, description="reject answers with numbers that the chunk does not hold")


class BackTranslationSettings(Settings):
    """Answering again: agreement is ROUGE-L F between answers, rounded to four decimals."""

    samples: int = Field(default=2, ge=0, le=32, description="answers drawn with the document; 0 = no check")
    min_agreement: float = Field(
        default=0.3, ge=0, le=1, description="least mean agreement of the answers drawn with the document and the given one"
    )
    min_consistency: float = Field(
        default=0.3, ge=0, le=1, description="least mean agreement of those answers with each other (from 2 samples on)"
    )
    without_document: Literal["off", "record", "reject"] = Field(
        default="record", description="answer once without the document: not at all, only measured, or what is known rejected"
    )
    max_known: float = Field(
        default=0.8, gt=0, le=1, description="with `reject`: agreement without the document from which the model knew it anyway"
    )
    sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.7, top_p=0.9, max_tokens=160), description="drawing them"
    )


class DocumentSettings(Settings):
    """How documents become instruction data."""

    form: Literal["alpaca", "sharegpt"] = Field(
        default="alpaca", description="single questions with their answers, or dialogues of several turns"
    )
    chunk: ChunkSettings = Field(default=ChunkSettings(), description="how documents are cut")
    quota: QuotaSettings = Field(default=QuotaSettings(), description="how many chunks are asked about")
    max_document_characters: int = Field(default=20_000_000, ge=1, description="longer documents are left out and counted")
    key_points: int = Field(default=6, ge=1, le=32, description="key points extracted of a chunk, at most")
    pairs: int = Field(default=5, ge=1, le=64, description="question and answer pairs of a chunk (alpaca)")
    pairs_per_request: int = Field(
        default=1, ge=1, le=16, description="pairs asked for in one reply; 1 gives each its own key point and a redraw of its own"
    )
    question_types: dict[QuestionType, float] = Field(
        default={name: 1.0 for name in QUESTION_TYPES}, description="weights of the types of questions; 0 or absent leaves one out"
    )
    difficulty: Difficulty = Field(default="hard", description="how demanding the questions are")
    domain: str | dict[Literal["en", "zh"], str] | None = Field(
        default=None, description="field of the expert who asks, for both languages or each; none: that of the document"
    )
    dialogues: int = Field(default=2, ge=1, le=16, description="dialogues of a chunk (sharegpt)")
    turns: int = Field(default=3, ge=2, le=12, description="questions in a dialogue; a clarifying question comes in addition")
    min_turns: int = Field(default=2, ge=2, description="questions that must be left of a dialogue")
    clarifying: float = Field(default=0.3, ge=0, le=1, description="share of dialogues in which the assistant asks back first")
    min_back_references: int = Field(default=1, ge=0, description="later questions that must refer to what was said before")
    personas: dict[Literal["en", "zh"], list[str]] = Field(
        default={
            "en": ["a beginner who learns on the job", "an experienced practitioner in a hurry", "a student before an examination",
                   "a sceptical reviewer"],
            "zh": ["刚入行、边做边学的新手", "时间紧张的资深从业者", "准备考试的学生", "爱追问的评审人员"],
        },
        description="who asks in dialogues; one is drawn for each",
    )  # fmt: skip
    structured: bool = Field(default=True, description="let the model write nothing but JSON of the wanted shape")
    attempts: int = Field(default=2, ge=1, le=8, description="draws of a reply that is malformed or cut off, the first included")
    min_question: dict[Literal["en", "zh"], int] = Field(
        default={"en": 5, "zh": 6}, description="shortest question, in words of English, characters of Chinese"
    )
    min_answer: dict[Literal["en", "zh"], int] = Field(default={"en": 4, "zh": 6}, description="likewise for answers")
    grounding: GroundingSettings = Field(default=GroundingSettings(), description="what an answer must find in its chunk")
    back_translation: BackTranslationSettings = Field(default=BackTranslationSettings(), description="answering again, to compare")
    novelty: Literal["off", "chunk", "document", "stage"] = Field(
        default="document", description="questions must be new among those of the chunk, of the document, or of the whole stage"
    )
    max_similarity: float = Field(
        default=0.7, gt=0, le=1, description="ROUGE-L F with an earlier question from which it is not new"
    )
    key_point_sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.3, top_p=0.9, max_tokens=384), description="drawing key points"
    )
    sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.7, top_p=0.9, max_tokens=512), description="drawing pairs and dialogues"
    )
    prompts: str | None = Field(
        default=None, description="folder with <language>/doc_<name>.txt that replace the project's prompts"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not any(weight > 0 for weight in self.question_types.values()):
            raise ValueError("question_types: every type has weight 0")
        if any(weight < 0 for weight in self.question_types.values()):
            raise ValueError("question_types: weights may not be negative")
        if self.min_turns > self.turns:
            raise ValueError(f"min_turns {self.min_turns} is more than turns {self.turns}")
        for lang in ("en", "zh"):
            if self.form == "sharegpt" and not self.personas.get(lang):
                raise ValueError(f"personas: none for {lang!r}")
        return self
