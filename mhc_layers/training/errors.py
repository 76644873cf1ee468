"""Errors of the training rooms; each message says what was got, what is accepted and what to do."""

from __future__ import annotations

__all__ = ["CheckpointError", "DataError", "NonFiniteLossError", "ResumeError", "TrainingError"]


class TrainingError(RuntimeError):
    """Something went wrong in a run; what was already saved stays as it is."""


class DataError(ValueError):
    """The data cannot be used: not found, not readable or too short. Choose another ``--data`` path."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another format or can't be written; the message says what is intact."""


class ResumeError(ValueError):
    """A run cannot be continued as asked, because the result would not equal the uninterrupted run."""


class NonFiniteLossError(TrainingError):
    """The loss or the gradient norm became NaN or infinite. Lower the learning rate, or resume from a checkpoint."""
