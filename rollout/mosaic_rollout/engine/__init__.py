"""Engines of our own. `LocalEngine` is the embedded default."""

from mosaic_rollout.engine.local import LocalEngine
from mosaic_rollout.engine.stats import EngineError, EngineStats, NonFiniteLogitsError

__all__ = ["EngineError", "EngineStats", "LocalEngine", "NonFiniteLogitsError"]
