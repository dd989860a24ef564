"""Evaluation: tasks of one or more suites played by a policy or an endpoint, as rates with intervals."""

from mosaic_fast.evaluate.play import evaluate_policy
from mosaic_fast.evaluate.tables import rates_table
from mosaic_fast.evaluate.tasks import EVALUATION_SEED, evaluation_tasks

__all__ = ["EVALUATION_SEED", "evaluate_policy", "evaluation_tasks", "rates_table"]
