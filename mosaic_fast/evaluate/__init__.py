"""Evaluation: tasks of one or more suites played by a policy or an endpoint, as rates with intervals."""

from mosaic_fast.evaluate.policy import EVALUATION_SEED, evaluate_policy
from mosaic_fast.evaluate.tables import rates_table

__all__ = ["EVALUATION_SEED", "evaluate_policy", "rates_table"]
