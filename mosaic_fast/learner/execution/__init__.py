"""How a step's forest is run: which forwards, in which order, and their gradients, exactly."""

from mosaic_fast.learner.execution.cost import CostModel, load_cost_model, save_cost_model
from mosaic_fast.learner.execution.coupling import Coupling, coupling_of, units_of
from mosaic_fast.learner.execution.execution import Execution, MicroBatch
from mosaic_fast.learner.execution.schedule import PLANS, Schedule

__all__ = [
    "PLANS",
    "CostModel",
    "Coupling",
    "Execution",
    "MicroBatch",
    "Schedule",
    "coupling_of",
    "load_cost_model",
    "save_cost_model",
    "units_of",
]
