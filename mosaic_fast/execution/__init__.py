"""How a step's forest is run: which forwards, in which order, and their gradients, exactly."""

from mosaic_fast.execution.cost import CostModel, load_cost_model, save_cost_model
from mosaic_fast.execution.execution import Execution, Piece
from mosaic_fast.execution.schedule import PLANS, Schedule

__all__ = ["PLANS", "CostModel", "Execution", "Piece", "Schedule", "load_cost_model", "save_cost_model"]
