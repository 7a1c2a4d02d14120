"""A reward model as an engine: a Hugging Face sequence classifier that answers a conversation with a number.

A request's messages end with the reply to be scored; the reply that comes back is the score as text. So scores go through
the reply cache like everything else that was asked of a model: they are computed once, and a run that reads them again
decides the same. The model lives in a supervised child process (operators.supervise), in a Ray actor where Ray runs; the
driver loads no torch.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cluster.placement import placement
from operators import tables
from operators.config import Settings, SettingsError
from operators.quality.model_scorer import Activation, Classifier, Scoring
from operators.supervise import Limits, Report, Supervisor, Task, UnitError
from operators.synthesis.flow import Flow, ask_all
from operators.synthesis.packaged import content_revision
from operators.synthesis.requests import PROMPT_TOO_LONG, REFUSED, EngineError, Messages, Reject, Reply, Request, SamplingSettings

_BATCH_REQUESTS = 256  # scored in one call of the child, sorted by length inside
_ROWS_IN_WORK = 64  # reported together, so that a crash is traced to a few
_MAX_DEATHS = 3  # of the processes of one replica, without a score between them
SCORE_SAMPLING = SamplingSettings(temperature=0.0, max_tokens=1)
"""What a request for a score carries: nothing is sampled, one token of the cap is reserved and none is used."""


class RewardSettings(Settings):
    """Which classifier scores replies, and how it is asked."""

    model: str = Field(description="directory with config.json, safetensors and a tokenizer; or `@STAGE` that made such a model")
    label: str | None = Field(default=None, description="the label whose score is taken; needed unless the model has one output")
    activation: Activation = Field(default="none", description="none: the logit; auto, softmax, sigmoid as in a `score` stage")
    form: Literal["auto", "chat", "pair"] = Field(
        default="auto",
        description="chat: the conversation through the chat template; pair: prompt and reply as two texts; "
        "auto: chat where the tokenizer has a template",
    )
    max_tokens: int = Field(default=2048, ge=8, description="longer conversations get no score: cutting would hide the reply's end")
    batch_tokens: int = Field(default=16384, ge=8, description="tokens of a batch, padding included")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="cuda gives each replica one GPU and computes in bfloat16")
    replicas: int = Field(default=1, ge=1, description="copies of the model")
    memory_bytes: int = Field(default=8 << 30, ge=256 << 20, description="resident memory at which a replica's process is ended")
    deadline_s: float = Field(default=600, gt=0, description="seconds without progress after which a replica's process is ended")


@dataclass(frozen=True)
class _Asking:
    """What the child needs to know; `scoring` as in operators.quality.model_scorer."""

    scoring: Scoring
    form: str


def check_reward(settings: RewardSettings) -> None:
    """Raises SettingsError unless the directory can hold a classifier; a stage's model is not looked for here."""
    if settings.model.startswith("@"):
        return
    directory = Path(settings.model)
    if not (directory / "config.json").is_file():
        raise SettingsError(f"reward.model {settings.model!r}: no such directory, or it has no config.json")
    if not any(directory.glob("*.safetensors")):
        raise SettingsError(f"reward.model {settings.model!r}: no *.safetensors in it (pickled weights are not loaded)")


def reward_revision(settings: RewardSettings, cache_directory: str) -> str:
    """What names the scores in the reply cache: the content of the model's directory and how it is asked."""
    check_reward(settings)
    asked = [settings.label, settings.activation, settings.form, settings.max_tokens, settings.device]
    return tables.content_hash(["reward", content_revision(Path(settings.model), cache_directory), *asked])


def score_by_reward(prompt: Messages, replies: Sequence[str], model: str) -> Flow[list[float | Reject]]:
    """The reward of each reply, or why it has none. `model` is the reward model's revision."""
    answered = yield from ask_all(
        [Request((*prompt, ("assistant", text)), SCORE_SAMPLING, seed=0, model=model) for text in replies]
    )
    return [reply.unanswered or _finite(reply) for reply in answered]


def _finite(reply: Reply) -> float | Reject:
    value = float(reply.text)
    return value if math.isfinite(value) else Reject("not_finite", detail=reply.text)


class RewardEngine:
    """A TextEngine (see operators.synthesis.requests) whose replies are scores. Processes start with the first request."""

    def __init__(self, settings: RewardSettings, cache_directory: str) -> None:
        self.settings = settings
        self._revision = reward_revision(settings, cache_directory)
        self._replicas: list[_Replica] = []
        self._idle: list[_Replica] = []
        self._pool: ThreadPoolExecutor | None = None
        self._changed = threading.Condition()

    @property
    def revision(self) -> str:
        return self._revision

    @property
    def in_flight(self) -> int:
        return 2 * _BATCH_REQUESTS * self.settings.replicas

    def open(self) -> RewardSession:
        return RewardSession(self)

    def start(self) -> None:
        """Make the replicas unless they are there; their models load when they are first asked."""
        with self._changed:
            if self._pool is None:
                asking = _Asking(
                    Scoring(
                        self.settings.model, "reward", self.settings.label, self.settings.activation, self.settings.max_tokens,
                        self.settings.batch_tokens, self.settings.device, None,
                    ),
                    self.settings.form,
                )  # fmt: skip
                limits = Limits(self.settings.memory_bytes, self.settings.deadline_s)
                self._replicas = [_Replica(asking, limits) for _ in range(self.settings.replicas)]
                self._idle = list(self._replicas)
                self._pool = ThreadPoolExecutor(self.settings.replicas, "reward")

    def stop(self) -> None:
        """End the processes; the engine can be started again."""
        with self._changed:
            pool, self._pool = self._pool, None
            replicas, self._replicas, self._idle = self._replicas, [], []
        for replica in replicas:
            replica.close()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, batch: list[tuple[int, Request]]) -> Future[list[tuple[int, Reply]]]:
        self.start()
        assert self._pool is not None
        return self._pool.submit(self._score, batch)

    def _score(self, batch: list[tuple[int, Request]]) -> list[tuple[int, Reply]]:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._idle) or self._pool is None)
            if self._pool is None:
                raise EngineError("the reward model was stopped while scores were outstanding")
            replica = self._idle.pop()
        try:
            replies = replica.score([request.messages for _, request in batch])
        finally:
            with self._changed:
                self._idle.append(replica)
                self._changed.notify()
        return [(number, reply) for (number, _), reply in zip(batch, replies, strict=True)]


class RewardSession:
    """One caller's conversations to be scored. A replica takes all that wait, up to a batch, as soon as it is free."""

    def __init__(self, engine: RewardEngine) -> None:
        self._engine = engine
        self._waiting: list[tuple[int, Request]] = []
        self._flying: set[Future[list[tuple[int, Reply]]]] = set()

    def submit(self, requests: Sequence[tuple[int, Request]]) -> None:
        self._waiting += requests

    def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
        while self._waiting and len(self._flying) < self._engine.settings.replicas:
            batch, self._waiting = self._waiting[:_BATCH_REQUESTS], self._waiting[_BATCH_REQUESTS:]
            self._flying.add(self._engine._submit(batch))
        done, self._flying = wait(self._flying, timeout_s, FIRST_COMPLETED) if self._flying else (set(), set())
        return [item for future in done for item in future.result()]

    def close(self) -> None:
        self._waiting = []
        for future in self._flying:
            future.cancel()


class _Replica:
    """One copy of the model in a supervised child: of an actor where Ray runs, else of this process."""

    def __init__(self, asking: _Asking, limits: Limits) -> None:
        self._asking, self._limits = asking, limits
        self._actor: Any = None
        self._local: RewardWorker | None = None

    def score(self, conversations: list[Messages]) -> list[Reply]:
        """Raises SettingsError for a model that is no classifier, EngineError when the process dies again and again."""
        import ray

        if not ray.is_initialized():
            if self._asking.scoring.device == "cuda":
                raise EngineError("a reward model on a GPU needs Ray, which gives it the device")
            if self._local is None:
                self._local = RewardWorker(self._asking, self._limits)
            return self._local.score(conversations)
        for death in range(_MAX_DEATHS):
            if self._actor is None:
                gpus = 1 if self._asking.scoring.device == "cuda" else 0
                where = placement("generate" if gpus else "cpu")
                actor = ray.remote(RewardWorker).options(num_cpus=1, num_gpus=gpus, resources=where, max_restarts=0)
                self._actor = actor.remote(self._asking, self._limits)
            try:
                return list(ray.get(self._actor.score.remote(conversations)))
            except ray.exceptions.RayActorError as error:  # its node is gone: the same conversations are scored again
                self._actor = None
                if death + 1 == _MAX_DEATHS:
                    raise EngineError(f"the reward model's actor died {_MAX_DEATHS} times on one batch: {error}") from error
            except ray.exceptions.RayTaskError as error:
                raise EngineError(str(error.cause)) from error
        raise AssertionError("unreachable")

    def close(self) -> None:
        import ray

        if self._actor is not None and ray.is_initialized():
            ray.kill(self._actor)
        self._actor = None
        if self._local is not None:
            self._local.close()
            self._local = None


class RewardWorker:
    """Scores conversations in its supervised child (a plain class; also the Ray actor's)."""

    def __init__(self, asking: _Asking, limits: Limits) -> None:
        self._asking = asking
        self._supervisor = Supervisor("operators.synthesis.reward:score_conversations", limits)

    def score(self, conversations: Sequence[Messages]) -> list[Reply]:
        """A reply for each conversation; one that ends the child by itself is refused, the others are scored.

        Raises EngineError.
        """
        arguments = {
            "unit": {"index": len(conversations), "path": self._asking.scoring.model},
            "conversations": conversations,
            "asking": asdict(self._asking),
        }
        try:
            return [Reply(**reply) for reply in self._supervisor.run(arguments)]
        except (UnitError, SettingsError) as error:
            raise EngineError(f"the reward model {self._asking.scoring.model} failed: {error}") from error

    def close(self) -> None:
        self._supervisor.close()

    def __del__(self) -> None:
        if (supervisor := getattr(self, "_supervisor", None)) is not None:  # none where the constructor did not run
            supervisor.close()


def score_conversations(task: Task, report: Report) -> list[dict[str, Any]]:
    """In the child: the replies of one batch as plain values. A probe (see operators.supervise) does only its rows."""
    raw = task.arguments["asking"]
    report.alive()
    scorer = _scorer(Scoring(**raw["scoring"]), raw["form"])
    report.alive()
    conversations = [tuple((role, content) for role, content in rows) for rows in task.arguments["conversations"]]
    replies: list[Reply] = []
    first, last = task.probe or (0, len(conversations))
    for start in range(first, last, _ROWS_IN_WORK):
        stop = min(start + _ROWS_IN_WORK, last)
        healthy = [row for row in range(start, stop) if row not in task.set_aside]
        with report.rows(start, stop):
            scored = dict(zip(healthy, scorer.score([conversations[row] for row in healthy]), strict=True))
        for row in range(start, stop):
            replies.append(scored.get(row) or Reply(task.set_aside.get(row, ""), REFUSED, 0, 0))
    return [asdict(reply) for reply in replies]


@functools.lru_cache(maxsize=1)
def _scorer(scoring: Scoring, form: str) -> ConversationScorer:
    return ConversationScorer(scoring, form)


class ConversationScorer:
    """The classifier with conversations in place of texts; it stands in the child, and in tests.

    Raises SettingsError as Classifier does, and when the form `chat` is asked of a tokenizer without a chat template.
    """

    def __init__(self, scoring: Scoring, form: str) -> None:
        self._classifier, self._scoring = Classifier(scoring), scoring
        template = bool(self._classifier.tokenizer.chat_template)
        if form == "chat" and not template:
            raise SettingsError(f"model {scoring.model}: its tokenizer has no chat template; ask it by `form: pair`")
        self._chat = template if form == "auto" else form == "chat"

    def score(self, conversations: Sequence[Messages]) -> list[Reply]:
        """The score of each conversation's last message, rounded to 4 decimals, as the text of a reply."""
        encodings = [self._encode(messages) for messages in conversations]
        fitting = [row for row, encoding in enumerate(encodings) if 0 < len(encoding["input_ids"]) <= self._scoring.max_tokens]
        found = self._classifier.score_encoded([encodings[row] for row in fitting])
        scores = dict(zip(fitting, found.tolist(), strict=True))
        return [
            Reply(f"{scores[row]:.4f}", "stop", 0, 0)
            if row in scores
            else Reply("", PROMPT_TOO_LONG, len(encoding["input_ids"]), 0)
            for row, encoding in enumerate(encodings)
        ]

    def _encode(self, messages: Messages) -> dict[str, list[int]]:
        tokenizer = self._classifier.tokenizer
        rows = [(role, self._defused(content)) for role, content in messages]
        if self._chat:
            text = tokenizer.apply_chat_template([{"role": role, "content": content} for role, content in rows], tokenize=False)
            found = tokenizer(text, add_special_tokens=False)
        else:
            found = tokenizer("\n\n".join(content for _, content in rows[:-1]), rows[-1][1])
        return {name: found[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in found}

    def _defused(self, content: str) -> str:
        """Text is data: control tokens of the tokenizer inside a message are taken apart."""
        for token in self._classifier.tokenizer.all_special_tokens:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return content
