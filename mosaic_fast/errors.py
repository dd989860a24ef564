"""Mistakes that are shown to a user without a traceback."""

from mosaic_rollout.errors import UserError

__all__ = ["EngineStoppedError", "TrainingError", "UserError"]


class TrainingError(UserError):
    """Training cannot go on, though the configuration is valid: a NaN, a full disk, a corrupt checkpoint."""


class EngineStoppedError(TrainingError):
    """The engine gave up. The policy is as its last update left it: it can be saved."""
