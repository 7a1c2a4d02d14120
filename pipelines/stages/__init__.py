"""Stages: what a recipe may name, each a typed configuration with a `run`. Modules load when first used."""

from __future__ import annotations

from operators.config import SettingsError, import_class, nearest
from operators.stage import Stage

STAGES: dict[str, str] = {
    "corpus": "pipelines.stages.corpus:CorpusStage",
    "quality_classifier": "pipelines.stages.quality:QualityClassifierStage",
    "dedup": "pipelines.stages.dedup:DedupStage",
    "export": "pipelines.stages.export:ExportStage",
    "score": "pipelines.stages.quality:ScoreStage",
    "select": "pipelines.stages.sampling:SelectStage",
    "mix": "pipelines.stages.sampling:MixStage",
    "line_dedup": "pipelines.stages.cutting:LineDedupStage",
    "substring_dedup": "pipelines.stages.cutting:SubstringDedupStage",
    "semantic_dedup": "pipelines.stages.semantic:SemanticDedupStage",
    "tokenizer": "pipelines.stages.tokens:TokenizerStage",
    "extend_tokenizer": "pipelines.stages.tokens:ExtendTokenizerStage",
    "pack": "pipelines.stages.tokens:PackStage",
    "conversations": "pipelines.stages.conversations:ConversationsStage",
    "generate": "pipelines.stages.generate:GenerateStage",
    "self_instruct": "pipelines.stages.synthesis:SelfInstructStage",
    "evol_instruct": "pipelines.stages.synthesis:EvolInstructStage",
    "responses": "pipelines.stages.responses:ResponsesStage",
    "document_instruct": "pipelines.stages.documents:DocumentInstructStage",
    "rankings": "pipelines.stages.rankings:RankingsStage",
    "preferences": "pipelines.stages.preferences:PreferencesStage",
    "curate": "pipelines.stages.curate:CurateStage",
    "pretrain": "pipelines.stages.training:PretrainStage",
    "sft": "pipelines.stages.training:SftStage",
    "dpo": "pipelines.stages.alignment:DpoStage",
    "reward": "pipelines.stages.reinforcement:RewardModelStage",
    "grpo": "pipelines.stages.reinforcement:GrpoStage",
    "fisher": "pipelines.stages.fisher:FisherStage",
    "kto": "pipelines.stages.alignment:KtoStage",
    "merge": "pipelines.stages.alignment:MergeStage",
    "reviewed": "pipelines.stages.reviewed:ReviewedStage",
    "evaluate": "pipelines.stages.evaluation:EvaluateStage",
    "promote": "pipelines.stages.promotion:PromoteStage",
}


def load(kind: str) -> type[Stage]:
    """The class of a stage kind, or of an import path `package.module:Class`. Raises SettingsError."""
    path = STAGES.get(kind, kind)
    if ":" not in path:
        raise SettingsError(f"unknown stage kind {kind!r}{nearest(kind, list(STAGES))}")
    return import_class(path, Stage, f"stage kind {kind!r}")
