"""The settings of Self-Instruct, with presets for what the paper's and Alpaca's code do."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from operators.config import Settings
from operators.synthesis.heuristics import InstructionRules
from operators.synthesis.requests import SamplingSettings

_PAPER_WORDS = [
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot", "go to"
]  # fmt: skip
_CHINESE_WORDS = ["图片", "图像", "照片", "图表", "文件", "地图", "画一", "画出", "绘制", "前往"]

PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "paper": {
        "seed_examples": 6,
        "machine_examples": 2,
        "tasks_per_call": 15,
        "example_length": {},
        "outputs": "form",
        "classification": "model",
        "inputs": "always",
        "instances_per_task": 5,
        "truncated": "reply",
        "rules": {"keywords": {"en": _PAPER_WORDS, "zh": _CHINESE_WORDS}, "statements": True},
        "instruction_sampling": {"temperature": 0.7, "top_p": 0.5, "presence_penalty": 2.0, "max_tokens": 1024, "stop": ["\n\n"]},
        "instance_sampling": {"temperature": 0.0, "presence_penalty": 1.5, "max_tokens": 350},
    },
    "alpaca": {
        "method": "alpaca",
        "seed_examples": 3,
        "machine_examples": 0,
        "tasks_per_call": 20,
        "example_length": {},
        "rules": {
            "keywords": {
                "en": [*_PAPER_WORDS, "video", "audio", "music", "flowchart", "diagram"],
                "zh": [*_CHINESE_WORDS, "视频", "音频", "音乐", "流程图", "示意图"],
            },
            "statements": True,
        },
        "instruction_sampling": {"temperature": 1.0, "max_tokens": 3072, "stop": []},
    },
}


class SelfInstructSettings(Settings):
    """How tasks are bootstrapped."""

    preset: Literal["small", "paper", "alpaca"] = Field(
        default="small",
        description="defaults of all other settings: for a small model, as in the paper's code, or as in Alpaca's; "
        "what is written beside it goes before it",
    )
    target: int = Field(default=64, ge=1, description="rows to make")
    max_rounds: int | None = Field(default=None, ge=1, description="rounds at most; none: until target, cap or min_yield")
    calls_per_round: int = Field(
        default=16, ge=1, description="requests for new tasks in a round; they all see the tasks of earlier rounds only"
    )
    min_yield: float = Field(
        default=0.05, ge=0, description="stop when a request for tasks brings fewer rows than this over the last rounds"
    )
    yield_window: int = Field(default=2, ge=1, description="rounds that min_yield looks back on")
    tasks_per_call: int = Field(default=8, ge=2, description="length of the list a request shows, examples included")
    method: Literal["self_instruct", "alpaca"] = Field(
        default="self_instruct", description="alpaca: instruction, input and output in one call"
    )
    outputs: Literal["chat", "form"] = Field(
        default="chat", description="who writes outputs of non-classification tasks; form: as in the paper"
    )
    classification: Literal["either", "model"] = Field(
        default="either",
        description="which tasks are answered label first: those that the model calls classification, or (either) also "
        "those whose words ask for a label; the paper: model",
    )
    seed_examples: int = Field(default=3, ge=1, description="seed tasks in a request; the paper's 6 suit large models")
    machine_examples: int = Field(default=1, ge=0, description="accepted tasks in a request; the paper has 2")
    example_length: dict[str, int] = Field(
        default={"en": 16, "zh": 32}, description="longest example, words (en) or characters (zh); any, for a language not named"
    )
    inputs: Literal["referred", "always"] = Field(
        default="referred",
        description="with outputs: chat, which tasks get an input: those that refer to one, or (as in the paper) all are asked",
    )
    instances_per_task: int = Field(
        default=1,
        ge=1,
        le=5,
        description="examples asked for, of classification tasks and with outputs: form of all; the paper: 5",
    )
    attempts: int = Field(
        default=1,
        ge=1,
        le=8,
        description="draws of a reply that is cut, empty or malformed, at most; a new task is mostly cheaper than a second draw",
    )
    truncated: Literal["item", "reply"] = Field(
        default="item",
        description="what goes when a list is cut: its last item, or (as in the paper) the whole reply",
    )
    languages: dict[str, float] = Field(default={"en": 0.8, "zh": 0.2}, description="share of the requests by language")
    max_similarity: float = Field(
        default=0.7, gt=0, le=1, description="a task is new when its ROUGE-L F to every other is below this"
    )
    rules: InstructionRules = Field(default=InstructionRules(), description="rules for instructions")
    instruction_sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.7, top_p=0.9, presence_penalty=0.5, max_tokens=128, stop=["\n\n"]),
        description="drawing tasks; the paper: temperature .7, top_p .5, presence penalty 2",
    )
    instance_sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.3, top_p=0.9, max_tokens=64), description="drawing inputs, labels and forms"
    )
    answer_sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.3, top_p=0.9, repetition_penalty=1.1, max_tokens=128),
        description="answering in chat",
    )
    ban_stock_phrases: bool = Field(
        default=False, description="forbid phrases such as `As an AI language model` in the prompt that asks for answers"
    )
    prompts: str | None = Field(default=None, description="folder with <language>/<name>.txt that replace the project's prompts")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """The preset's values where nothing else is written."""
        if isinstance(values, dict) and isinstance(preset := values.get("preset", "small"), str):
            return {**PRESETS.get(preset, {}), **values}
        return values

    @property
    def drop_reply(self) -> bool:
        return self.truncated == "reply"

    @property
    def most_instances(self) -> int:
        """Rows that one task can make."""
        return self.instances_per_task if self.method == "self_instruct" else 1

    @property
    def list_sampling(self) -> SamplingSettings:
        """`instruction_sampling`, ended before the item that would be one too many."""
        sampling = self.instruction_sampling
        if self.method == "alpaca":
            return sampling
        return sampling.model_copy(update={"stop": [*sampling.stop, f"\n{self.tasks_per_call + 1}."]})

    def shares(self, available: set[str]) -> dict[str, float]:
        """The languages that have seeds, with shares that sum to 1. Raises ValueError when none is left."""
        wanted = {lang: share for lang, share in self.languages.items() if share > 0 and lang in available}
        if not wanted:
            raise ValueError(f"no seed task in the languages {sorted(self.languages)}; the seeds have {sorted(available)}")
        return {lang: share / sum(wanted.values()) for lang, share in wanted.items()}
