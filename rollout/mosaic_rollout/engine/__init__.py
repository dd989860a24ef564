"""Engines of our own. `LocalEngine` is the embedded default."""

from .errors import EngineError, NonFiniteLogitsError
from .local import LocalEngine
from .stats import EngineStats

__all__ = ["EngineError", "EngineStats", "LocalEngine", "NonFiniteLogitsError"]
