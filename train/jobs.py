"""The kinds of training job: the settings each is parsed with and the function that does it. Loads a framework at first use."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

KINDS: dict[str, tuple[str, str]] = {
    "pretrain": ("train.settings:PretrainJob", "train.pretrain:run"),
    "sft": ("train.settings_finetune:SftJob", "train.sft:run"),
    "dpo": ("train.settings_finetune:DpoJob", "train.dpo:run"),
    "kto": ("train.settings_finetune:KtoJob", "train.kto:run"),
    "reward": ("train.settings_alignment:RewardModelJob", "train.reward:run"),
    "grpo": ("train.settings_alignment:GrpoJob", "train.grpo:run"),
    "merge": ("train.settings_finetune:MergeJob", "train.export:run"),
    "fisher": ("train.settings_fisher:FisherJob", "train.fisher:run"),
    "evaluate": ("train.settings_evaluate:EvaluateJob", "train.evaluate:run"),
}
"""kind -> (settings class, function `run(job, directory, workers) -> result`), as import paths."""


def load(kind: str) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """The settings class and the function of a kind."""
    settings, function = (path.split(":") for path in KINDS[kind])
    return getattr(import_module(settings[0]), settings[1]), getattr(import_module(function[0]), function[1])


def warm_up() -> None:
    """Import what every job needs, so that the first one does not wait for it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    for kind in ("pretrain", "sft", "dpo", "evaluate"):
        load(kind)
