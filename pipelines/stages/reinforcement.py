"""Recipe stages that learn from judgements: a reward model from pairs, and reinforcement by verifiable rewards."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from operators.config import SettingsError
from operators.stage import StageContext
from pipelines.stages.training import FinetuneStage, Mixed, TunedStage, is_external, model_path, paths
from train.settings import OptimizerSettings
from train.settings_alignment import GrpoSettings, RewardModelCheck, RewardModelSettings


class RewardModelStage(RewardModelSettings, FinetuneStage):
    """Trains a reward model on preference pairs: a sequence classifier whose one output says how good a reply is.

    Stages that judge name it as `reward: {model: "@STAGE"}`, a `grpo` stage as `{check: reward_model, model: "@STAGE"}`.
    """

    told: ClassVar[type[OptimizerSettings]] = RewardModelSettings

    kind: Literal["reward"] = "reward"
    input: Mixed = Field(description="A stage with preference pairs, or stages with their shares of the mixture.")


class GrpoStage(GrpoSettings, TunedStage):
    """Trains a model by rewards that can be verified (GRPO or RLOO): replies to prompts are drawn, scored and compared.

    Leaves a row for each reply with its scores, beside the model.
    """

    version: ClassVar[int] = 2  # scores before and after
    told: ClassVar[type[OptimizerSettings]] = GrpoSettings

    kind: Literal["grpo"] = "grpo"
    input: Mixed = Field(
        description="A stage with conversations, or stages with their shares: the last answer of each is the reference."
    )

    @property
    def judges(self) -> dict[str, RewardModelCheck]:
        """The rewards that are reward models."""
        return {name: check for name, check in self.rewards.items() if isinstance(check, RewardModelCheck)}

    def kept_out(self, context: StageContext, name: str) -> float:
        # What is learnt is the reward, which is measured on the way.
        return super().kept_out(context, name) if self.is_general(context, name) else 0.0

    def validate_deep(self) -> None:
        super().validate_deep()
        for name, check in self.judges.items():
            if not check.model.startswith("@") and not is_external(check.model):
                raise SettingsError(f"{self.kind}.rewards.{name}.model: {check.model!r} is neither @STAGE nor a path (with a `/`)")

    def input_names(self) -> list[str]:
        judges = [check.model[1:] for check in self.judges.values() if check.model.startswith("@")]
        return list(dict.fromkeys([*super().input_names(), *judges]))

    def files(self) -> list[str]:
        return [*super().files(), *paths([check.model for check in self.judges.values() if not check.model.startswith("@")])]

    def job(self, context: StageContext) -> dict[str, Any]:
        job = super().job(context)
        for name, check in self.judges.items():
            stage = check.model.removeprefix("@")
            path = context.model_of(stage) if check.model.startswith("@") else model_path(context, check.model)
            job["rewards"][name]["model"] = path
        return job
