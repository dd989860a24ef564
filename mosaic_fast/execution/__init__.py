"""How a step's forest is run: which forwards, in which order, and their gradients, exactly."""

from mosaic_fast.execution.execution import Execution, Piece, Schedule

__all__ = ["Execution", "Piece", "Schedule"]
