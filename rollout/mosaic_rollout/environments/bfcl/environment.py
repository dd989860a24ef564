"""BFCL as an environment: its multi-turn and single-turn test cases, one tool call at a time.

The Berkeley Function Calling Leaderboard v4 (Patil et al., ICML 2025; Apache-2.0; `bfcl-eval==2026.3.23`)
asks for benign tool use only: a policy that was made safe must keep this ability. Nothing of the benchmark is
stored in this repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

from mosaic_rollout.environments.bfcl.api import Record, load_bfcl
from mosaic_rollout.environments.bfcl.multi_turn import MultiTurnEpisode
from mosaic_rollout.environments.bfcl.single_turn import SingleTurnEpisode
from mosaic_rollout.environments.bfcl.tasks import MULTI_TURN, case_of, make_task, read_cases, read_records
from mosaic_rollout.environments.splits import divide, draw
from mosaic_rollout.types import Task


class BfclEnvironment:
    """BFCL's cases of some categories; all are benign.

    suites: categories to train on. heldout_suites: categories to hold out; without them, cases of `suites`.
    heldout_frac: share of the scenarios that are held out where both name them: the four multi-turn
    categories are variants of the same 200 scenarios. max_observation_chars: longer tool outputs are cut.

    Raises EnvironmentMissing where bfcl-eval is not installed, UserError for an unknown category.

    >>> environment = BfclEnvironment(["multi_turn_base"])                         # doctest: +SKIP
    >>> [task.task_id for task in environment.sample("train", 1, seed=0)]          # doctest: +SKIP
    ['multi_turn_base_112']
    """

    name = "bfcl"

    def __init__(
        self,
        suites: Sequence[str] = ("multi_turn_base",),
        *,
        heldout_suites: Sequence[str] = (),
        heldout_frac: float = 0.25,
        max_observation_chars: int = 16_000,
    ) -> None:
        self._api, self._limit = load_bfcl(), max_observation_chars
        train = read_cases(self._api, suites)
        heldout = read_cases(self._api, heldout_suites) if heldout_suites else None
        divided = divide(train, heldout, lambda case: case.leak_key, heldout_frac)
        self._pools = {split: [make_task(case, split) for case in cases] for split, cases in divided.items()}
        self._functions = lru_cache(maxsize=None)(self._read_functions)

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, a pure function of its arguments; repeats only once all have been drawn."""
        return draw(self._pools, split, count, seed)

    def tasks(self, split: str) -> list[Task]:
        """Every task of a split, in BFCL's order."""
        return list(self._pools[split])

    def reset(self, task: Task) -> MultiTurnEpisode | SingleTurnEpisode:
        """A fresh episode of a task that `sample` or `tasks` gave."""
        case = case_of(task)
        if case.category not in MULTI_TURN:
            return SingleTurnEpisode(self._api, case)
        classes = cast("Sequence[str]", case.entry["involved_classes"])
        functions = [function for name in classes for function in self._functions(name)]
        return MultiTurnEpisode(self._api, case, functions, self._limit)

    def _read_functions(self, class_name: str) -> list[Record]:
        return read_records(self._api.data / "multi_turn_func_doc" / self._api.function_files[class_name])
