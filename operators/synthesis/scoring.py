"""What a reply is worth: one interface over form, agreement, a judge and a reward model.

*form* is in [0, 1]: 1 less what is plainly wrong with a reply, seen without understanding it: cut off (.5), a refusal (.5),
repeated 4-grams (their share), the prompt echoed (ROUGE-L F with it where above one half), another script than the
prompt's language (the share). It does not grow with length. Every scorer measures it, and a reply of form 0 is never
chosen.
*agreement* is in [0, 1]: the mean ROUGE-L F with the prompt's other samples, which is minimum-Bayes-risk selection (Eikema
and Aziz 2020): what a model says again and again is likelier to be right than what it says once. With `agreement:
reference` it is ROUGE-L F with the row's own answer.

| scorer    | score                                                        | scale                            |
|-----------|--------------------------------------------------------------|----------------------------------|
| form      | form                                                         | [0, 1]                           |
| agreement | weight * agreement + (1 - weight) * form                     | [0, 1]                           |
| judge     | mean points; or the share of comparisons won (see judging)   | [low, high] of the judge; [0, 1] |
| reward    | what the classifier says (see reward)                        | the model's own                  |

*Length.* Judges and reward models like long replies (Dubois et al. 2024, "Length-Controlled AlpacaEval", arXiv
2404.04475). `length_penalty` takes points off for every doubling of a reply's length against the geometric mean of the
prompt's samples (and gives them for every halving), which is the linear control of that paper inside one prompt; what a
run measures as `points_per_doubling` is the penalty that leaves no linear relation. Lengths are tokens of the answering
model. Scores are rounded to four decimals before anything is decided.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from operators.config import Settings
from operators.synthesis import heuristics, judging, prompts
from operators.synthesis.flow import Flow
from operators.synthesis.judging import Case, JudgeSettings
from operators.synthesis.novelty import rouge_l, rouge_l_matrix
from operators.synthesis.requests import Messages, Reject, Reply, Request, SamplingSettings, request_seed
from operators.synthesis.reward import RewardSettings, score_by_reward

Scorer = Literal["form", "agreement", "judge", "reward"]


class AnswerSettings(Settings):
    """How replies are drawn."""

    samples: int = Field(default=4, ge=1, le=64, description="replies drawn for a prompt")
    sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=1.0, top_p=0.95, max_tokens=96), description="drawing the samples"
    )
    framed: bool = Field(
        default=True,
        description="ask with the system message of the template `answer` where the prompt has none; "
        "off: the prompt's own messages alone, as a model in training will see them",
    )
    prompts: str | None = Field(
        default=None, description="folder with <language>/<name>.txt (answer, judge_points, judge_pair) that replace the project's"
    )


class ScoringSettings(Settings):
    """How replies are scored."""

    scorer: Scorer = Field(default="agreement", description="form, agreement, judge or reward: see docs/preferences.md")
    agreement: Literal["samples", "reference"] = Field(
        default="samples", description="what `agreement` compares with: the other samples, or the row's own answer"
    )
    agreement_weight: float = Field(default=0.5, ge=0, le=1, description="weight of agreement against form")
    judge: JudgeSettings = Field(default=JudgeSettings(), description="for `scorer: judge`: who judges and how")
    reward: RewardSettings | None = Field(default=None, description="for `scorer: reward`: the classifier")
    length_penalty: float = Field(
        default=0.0,
        description="points taken off a score for each doubling of the length over the prompt's samples; below 0 they are given",
    )

    @model_validator(mode="after")
    def _scorer_has_what_it_needs(self) -> ScoringSettings:
        if self.scorer == "reward" and self.reward is None:
            raise ValueError("`scorer: reward` needs `reward: {model: ...}`")
        if self.scorer != "reward" and self.reward is not None:
            raise ValueError("`reward` is given but not used: write `scorer: reward`")
        if self.scorer != "judge" and self.judge != JudgeSettings():
            raise ValueError("`judge` is given but not used: write `scorer: judge`")
        return self


@dataclass(frozen=True)
class OpenPrompt:
    """A conversation up to a user's turn, and the row's own answer to it if it has one."""

    id: str
    messages: Messages
    reference: str | None
    lang: str

    @property
    def text(self) -> str:
        return "\n\n".join(content for _, content in self.messages)

    @property
    def template_lang(self) -> str:
        """The language of templates: the prompt's own where there are some, else English."""
        return self.lang if self.lang in prompts.LANGUAGES else "en"


@dataclass(frozen=True)
class Panel:
    """Who answers and who scores: names and revisions that stand in requests and in provenance."""

    seed: int
    model: str
    revision: str
    judge_model: str = ""
    judge_revision: str = ""  # empty where the answering model judges
    reward_model: str = ""
    reward_revision: str = ""


@dataclass(frozen=True)
class Scored:
    """A sample with its score, after the length penalty and before it (None: the scorer has none, `why` says why)."""

    text: str
    score: float | None
    form: float
    tokens: int = 1
    number: int = 0  # of the sample
    raw: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    truncated: bool = False
    why: Reject | None = None


@dataclass
class Scores:
    """All samples of one prompt, in their order. `better` holds a judge's verdicts on pairs of samples (by number)."""

    samples: list[Scored]
    better: dict[tuple[int, int], bool] | None = None
    compared: set[tuple[int, int]] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)  # what the judge was asked and said


def open_prompt(row: dict[str, Any]) -> OpenPrompt | Reject:
    """The prompt of a CONVERSATIONS row: all before its last assistant turn, or all of it when the user speaks last."""
    messages = tuple((message["role"] or "", message["content"] or "") for message in row["messages"] or [])
    if row.get("tools") is not None or any(role in ("tool", "function_call") for role, _ in messages):
        return Reject("tools")  # an answer without the tools that the prompt offers would be no answer to it
    reference = messages[-1][1] if messages and messages[-1][0] == "assistant" else None
    if reference is not None:
        messages = messages[:-1]
    if not messages or messages[-1][0] != "user" or not messages[-1][1].strip():
        return Reject("no_prompt")
    if any(role not in ("system", "user", "assistant") for role, _ in messages):
        return Reject("unknown_role", detail=next(role for role, _ in messages if role not in ("system", "user", "assistant")))
    return OpenPrompt(row["id"], messages, reference, row["lang"] or heuristics.language_of(messages[-1][1]))


def answer_messages(prompt: OpenPrompt, settings: AnswerSettings) -> Messages:
    """The prompt as the model is asked: framed by the answering template, or as it is."""
    if not settings.framed or (len(prompt.messages) > 1 and prompt.messages[0][0] == "system"):
        return prompt.messages
    template = prompts.load("answer", prompt.template_lang, settings.prompts)
    if len(prompt.messages) == 1:
        return template.render(prompt=prompt.messages[0][1])
    return (*(section for section in template.sections if section[0] == "system"), *prompt.messages)


def sample_request(prompt: OpenPrompt, settings: AnswerSettings, seed: int, step: str, number: int) -> Request:
    """The request of sample `number` of a prompt."""
    return Request(answer_messages(prompt, settings), settings.sampling, request_seed(seed, step, prompt.id, number), number)


def scoring_bound(samples: int, settings: ScoringSettings) -> int:
    """The most completion tokens that scoring so many samples may ask for."""
    if settings.scorer == "judge":
        return judging.calls(samples, settings.judge) * settings.judge.sampling.max_tokens
    return samples if settings.scorer == "reward" else 0


def form_score(prompt: str, reply: Reply, lang: str) -> float:
    """1 less the faults of a reply that can be seen without understanding it, at least 0."""
    text = reply.text.strip()
    if heuristics.without_content(text):
        return 0.0
    faults = 0.5 * reply.truncated + 0.5 * heuristics.refuses(text) + heuristics.repeated_share(text)
    echo = rouge_l(prompt, text)
    faults += echo if echo > 0.5 else 0.0
    faults += 1.0 - heuristics.script_share(text, lang) if lang in prompts.LANGUAGES else 0.0
    return round(max(0.0, 1.0 - faults), 4)


def score(
    prompt: OpenPrompt, replies: Sequence[tuple[int, Reply]], settings: ScoringSettings, panel: Panel, folder: str | None = None
) -> Flow[Scores]:
    """Score numbered samples of one prompt. Equal texts are scored once; a reply without text has no score."""
    question = prompt.messages[-1][1]
    samples = [
        Scored(
            text=reply.text.strip(),
            score=None,
            form=form_score(question, reply, prompt.lang),
            tokens=max(1, reply.completion_tokens),
            number=number,
            truncated=reply.truncated,
        )
        for number, reply in replies
    ]
    scores = Scores(samples)
    if settings.scorer == "form":
        found: list[float | Reject] = [sample.form for sample in samples]
    elif settings.scorer == "agreement":
        shared = _agreement(prompt, samples, settings)
        weight = settings.agreement_weight
        found = [weight * mine + (1 - weight) * sample.form for mine, sample in zip(shared, samples, strict=True)]
        scores.samples = [replace(sample, parts={"agreement": mine}) for mine, sample in zip(shared, samples, strict=True)]
    else:
        texts = list(dict.fromkeys(sample.text for sample in samples if sample.text))
        places = {text: place for place, text in enumerate(texts)}
        if settings.scorer == "judge":
            case = Case(
                prompt.id, prompt.messages, prompt.reference, prompt.template_lang, panel.seed, folder, panel.judge_revision
            )
            judged = yield from judging.judge(case, texts, settings.judge)
            given: list[float | Reject] = [
                value if value is not None else _unjudged(why) for value, why in zip(judged.scores, judged.failed, strict=True)
            ]
            scores.counts = judged.counts
            scores.samples = [replace(s, parts=judged.parts[places[s.text]] if s.text else {}) for s in samples]
            if settings.judge.method == "pairs":
                first = {places[s.text]: s.number for s in reversed(samples) if s.text}
                scores.better = {(first[i], first[j]): better for (i, j), better in judged.better.items()}
                scores.compared = {(first[i], first[j]) for i, j in judged.compared}
        else:
            given = yield from score_by_reward(prompt.messages, texts, panel.reward_revision)
        found = [given[places[sample.text]] if sample.text else Reject("empty") for sample in samples]
    scores.samples = _penalised(
        [
            replace(sample, why=value) if isinstance(value, Reject) else replace(sample, raw=round(value, 4))
            for sample, value in zip(scores.samples, found, strict=True)
        ],
        settings.length_penalty,
    )
    return scores


def _agreement(prompt: OpenPrompt, samples: Sequence[Scored], settings: ScoringSettings) -> list[float]:
    texts = [sample.text for sample in samples]
    if settings.agreement == "reference":
        return [round(rouge_l(prompt.reference or "", text), 4) for text in texts]
    matrix = rouge_l_matrix(texts)
    np.fill_diagonal(matrix, 0.0)
    return [round(value, 4) for value in (matrix.sum(axis=1) / max(1, len(texts) - 1)).tolist()]


def _unjudged(why: Reject | None) -> Reject:
    return Reject("judge_" + why.reason, why.value, why.detail) if why is not None else Reject("judge_not_compared")


def _penalised(samples: Sequence[Scored], penalty: float) -> list[Scored]:
    """The samples with `score` = raw score - penalty * log2(length / geometric mean length of those that have a score)."""
    lengths = [math.log2(sample.tokens) for sample in samples if sample.raw is not None]
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    return [
        sample if sample.raw is None else replace(sample, score=round(sample.raw - penalty * (math.log2(sample.tokens) - mean), 4))
        for sample in samples
    ]


def provenance_sampling(settings: AnswerSettings, scoring: ScoringSettings, panel: Panel) -> str:
    """JSON of how replies were drawn and by whom they were scored, for the column `provenance.sampling`."""
    found: dict[str, Any] = {"answer": settings.sampling.model_dump(), "scorer": scoring.scorer}
    if scoring.scorer == "judge":
        found["judge"] = {
            "model": panel.judge_model or panel.model,
            "revision": panel.judge_revision or panel.revision,
            "method": scoring.judge.method,
            "sampling": scoring.judge.sampling.model_dump(),
        }
    elif scoring.scorer == "reward":
        found["reward"] = {"model": panel.reward_model, "revision": panel.reward_revision}
    if scoring.length_penalty:
        found["length_penalty"] = scoring.length_penalty
    return json.dumps(found, sort_keys=True)


def templates(prompt: OpenPrompt, settings: AnswerSettings, scoring: ScoringSettings) -> list[prompts.Prompt]:
    """The templates that a row of this prompt was made with."""
    names = ["answer"] if settings.framed else []
    names += [scoring.judge.template] if scoring.scorer == "judge" else []
    return [prompts.load(name, prompt.template_lang, settings.prompts) for name in names]
