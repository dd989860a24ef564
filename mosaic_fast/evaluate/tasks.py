"""Which tasks an evaluation plays: the same ones for every model, each of them once. No torch."""

from __future__ import annotations

from mosaic_rollout.types import Environment, Task

EVALUATION_SEED = 20_260_303  # of the tasks, the same for every run


def evaluation_tasks(environment: Environment, split: str, count: int) -> list[Task]:
    """At most `count` fixed tasks of a split, in a fixed order.

    An environment with fewer tasks draws them again until it has as many as it was asked for. A task drawn
    again is left out: it is no new evidence, and an interval that counted it would be too narrow. So the
    length of the list, not `count`, is the number of independent cases.
    """
    drawn = environment.sample(split, count, EVALUATION_SEED)
    return list({task.task_id: task for task in drawn}.values())
