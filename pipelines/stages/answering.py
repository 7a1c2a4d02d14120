"""What the stages that draw and score replies have in common: who scores, which prompts are taken, what is told at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, cast

from cluster import storage
from operators import shards
from operators.config import SettingsError
from operators.ledger import merge_stats
from operators.stage import StageContext
from operators.synthesis.engine import EngineSettings, check_engine, engine_revision
from operators.synthesis.flow import Flow, asks_nothing
from operators.synthesis.generator import Generator
from operators.synthesis.length_bias import biases
from operators.synthesis.packaged import PREFIX, ModelError
from operators.synthesis.requests import Reject, TextEngine
from operators.synthesis.reward import RewardEngine, RewardSettings, check_reward, reward_revision
from operators.synthesis.routing import RoutedEngine
from operators.synthesis.rows import INSTRUCTIONS, Account
from operators.synthesis.scoring import OpenPrompt, Panel, ScoringSettings, open_prompt
from operators.synthesis.seen import SeenHashes
from pipelines.stages.generating import GeneratingStage, Row, follow_rows, located, short_name

Duplicates = Literal["reject", "answer"]


class AnsweringStage(GeneratingStage):
    """Base of `responses` and `preferences`; the class that derives from it has the fields of ScoringSettings as well."""

    version: ClassVar[int] = 2

    @property
    def _scoring(self) -> ScoringSettings:
        return cast(ScoringSettings, self)

    @property
    def _judging_model(self) -> EngineSettings | None:
        """The judge's model, where it is another than the one that answers."""
        scoring = self._scoring
        other = scoring.judge.generator if scoring.scorer == "judge" else None
        return None if other == self.generator else other

    def validate_deep(self) -> None:
        super().validate_deep()
        if self._judging_model is not None:
            try:
                check_engine(self._judging_model)
            except ModelError as error:
                raise SettingsError(f"{self.kind}.judge.generator.{error}") from error
        if self._scoring.reward is not None:
            check_reward(self._scoring.reward)

    def needs_ray(self) -> bool:
        judge, reward = self._judging_model, self._scoring.reward
        return (
            super().needs_ray()
            or (judge is not None and judge.endpoint is None)
            or (reward is not None and reward.device == "cuda")
        )

    def model_stages(self) -> list[str]:
        models = [self.generator.model, *([self._judging_model.model] if self._judging_model else [])]
        models += [self._scoring.reward.model] if self._scoring.reward else []
        return list(dict.fromkeys(model[1:] for model in models if model.startswith("@")))

    def files(self) -> list[str]:
        found, judge, reward = super().files(), self._judging_model, self._scoring.reward
        if judge is not None and judge.endpoint is None and not judge.model.startswith((PREFIX, "@")):
            found.append(storage.join(judge.model, "*.*"))
        if reward is not None and not reward.model.startswith("@"):
            found.append(storage.join(reward.model, "*.*"))
        return found

    def reward_settings(self, context: StageContext) -> RewardSettings | None:
        """The reward model's settings with its path."""
        reward = self._scoring.reward
        if reward is None:
            return None
        model = context.model_of(reward.model[1:]) if reward.model.startswith("@") else context.path(reward.model)
        return reward.model_copy(update={"model": model})

    def make_panel(self, context: StageContext) -> tuple[Generator, Panel, Callable[[], None]]:
        """The generator, through which all models of the stage are asked; their names; and what ends the reward model."""
        generator = self.make_generator(context)
        judge, reward = self._judging_model, self.reward_settings(context)
        others: dict[str, Callable[[], TextEngine]] = {}
        judge_revision = reward_revision_ = ""
        scorer: list[RewardEngine] = []
        if judge is not None:
            asked = located(judge, context)
            judge_revision = engine_revision(asked, context.cache_directory)
            others[judge_revision] = lambda: cast(TextEngine, context.services["engine"](asked))
        if reward is not None:
            reward_revision_ = reward_revision(reward, context.cache_directory)

            def start() -> TextEngine:
                scorer.append(RewardEngine(reward, context.cache_directory))
                return scorer[0]

            others[reward_revision_] = start
        if others:
            own = generator.engine
            routes = RoutedEngine(own, others)
            generator.engine = lambda: routes
        panel = Panel(
            context.seed,
            self.model_name,
            generator.revision,
            short_name(judge.model) if judge is not None else "",
            judge_revision if judge_revision != generator.revision else "",
            short_name(self._scoring.reward.model) if self._scoring.reward is not None else "",
            reward_revision_,
        )

        def end() -> None:
            for engine in scorer:
                engine.stop()

        return generator, panel, end

    def prompts_of(self, context: StageContext, names: list[str], duplicates: Duplicates) -> Iterator[Row | None]:
        """Rows with the key `taken`: their OpenPrompt, or the Reject that says why they are not asked.

        Told apart here, where every row passes by whether its unit is committed or not, so that a resumed run sees the same
        duplicates. Memory: 8 bytes a prompt.
        """
        seen, taken = SeenHashes(), 0
        for row in follow_rows(context, names, INSTRUCTIONS):
            if row is None:
                yield None
                continue
            found = open_prompt(row)
            if isinstance(found, OpenPrompt):
                new = duplicates == "answer" or seen.add(piece for message in found.messages for piece in message)
                if not new:
                    found = Reject("duplicate_prompt")
                elif context.limit is not None and taken >= context.limit:
                    found = Reject("left_over", detail="limit")
                else:
                    taken += 1
            yield {**row, "taken": found}

    def unasked(self, row: Row, account: Account) -> None:
        """Enter a row that the token cap left out."""
        why = row["taken"] if isinstance(row["taken"], Reject) else Reject("token_cap")
        account.reject(row["id"], text_of(row), why, created=False)

    def measures(self, context: StageContext) -> dict[str, Any]:
        """Statistics that follow from those of the units: length bias by language, and how far the judge agrees with itself."""
        total: dict[str, Any] = {}
        for _, record in sorted(shards.committed_units(context.directory).items()):
            merge_stats(total, {name: record["stats"].get(name, {}) for name in ("length", "judge")})
        found: dict[str, Any] = {"length_bias": biases(total["length"])} if total.get("length") else {}
        judge = total.get("judge", {})
        if judge.get("comparisons"):
            shown = judge.get("said_first", 0) + judge.get("said_second", 0)
            found["judge_consistency"] = round(judge.get("consistent", 0) / judge["comparisons"], 4)
            found["judge_first_share"] = round(judge.get("said_first", 0) / shown, 4) if shown else 0.0
        return found


def text_of(row: Row) -> str:
    return "\n\n".join(message["content"] or "" for message in row["messages"] or [])


def rejected(kind: str, row: Row, why: Reject) -> Flow[Account]:
    """The flow of a row that is not asked about."""
    account = Account(kind)
    account.reject(row["id"], text_of(row), why, created=False)
    return asks_nothing(account)
