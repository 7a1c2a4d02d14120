"""What can go wrong with a training job. Importing this module loads no framework."""

from __future__ import annotations


class JobCancelled(RuntimeError):
    """The user stopped the job; its last checkpoint stays."""


class JobError(RuntimeError):
    """What one worker could not do, raised by all of them together."""


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became infinite or NaN; the message names the batch."""


class TrainingError(RuntimeError):
    """A training job failed; the message is the worker's own, `details` its traceback."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details
