"""The evaluation inside a training run: fixed held-out tasks, played by the current weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mosaic_fast.evaluate.tasks import evaluation_tasks
from mosaic_fast.metrics import Rate, rollout_rates

if TYPE_CHECKING:  # torch is imported only once the arguments are known to be right
    from mosaic_fast.components import Components


def evaluate_policy(
    components: Components, split: str, count: int, *, temperature: float, version: int = 0, seed: int = 0
) -> dict[str, Rate]:
    """Rates of one rollout a task on the tasks of `evaluation_tasks`, by the current weights as `version`."""
    from mosaic_fast.components import GroupPlan
    from mosaic_fast.distributed.exchange import all_groups

    tasks = evaluation_tasks(components.loop.environment, split, count)
    share = components.play(components.loop_at(temperature), tasks, GroupPlan(1, seed), version=version)
    groups = all_groups(components.world, share, tasks)
    return rollout_rates([rollout for group in groups for rollout in group])
