"""Evaluation: tasks of one or more suites played by a policy or an endpoint, as rates with intervals.

`mosaic_fast.evaluate(...)` is the call for scripts (mosaic_fast/api.py).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mosaic_fast import make_callable

if TYPE_CHECKING:
    from mosaic_fast.evaluate.play import evaluate_policy
    from mosaic_fast.evaluate.tables import rates_table
    from mosaic_fast.evaluate.tasks import EVALUATION_SEED, evaluation_tasks

__all__ = ["EVALUATION_SEED", "evaluate_policy", "evaluation_tasks", "rates_table"]

_MODULES = {
    "EVALUATION_SEED": "tasks",
    "evaluate_policy": "play",
    "evaluation_tasks": "tasks",
    "rates_table": "tables",
}


def __getattr__(name: str) -> object:
    """Import what is asked for, and no more: the command line is read without transformers."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


make_callable(__name__)
