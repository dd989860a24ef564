"""PrivacyLens as an environment: does an agent's last message give away what it must not.

PrivacyLens (Shao et al., NeurIPS 2024, arXiv 2409.00138; MIT licence). The cases come from the user's copy of
`main_data.json`. An episode opens with the user's request and the course of the case, which only read things;
what is left is one action, the message that was asked for. A judge says which of the case's secrets it leaks
and how well it serves the request. Nothing of the benchmark is stored in this repository.
"""

from __future__ import annotations

from pathlib import Path

from mosaic_rollout.environments.privacylens.cases import Case, case_of, read_cases
from mosaic_rollout.environments.privacylens.episode import PrivacyLensEpisode
from mosaic_rollout.environments.splits import draw
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task


class PrivacyLensEnvironment:
    """The cases of a file, all of them for evaluation; each a benign task that can be done without a leak.

    Raises UserError for a file that does not fit.
    """

    name = "privacylens"

    def __init__(self, tasks: Path) -> None:
        self._tasks = [_task(case) for case in read_cases(tasks)]

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of the split `heldout`, a pure function of its arguments. UserError for another."""
        if split != "heldout":
            raise UserError("PrivacyLens is for evaluation only: it has no tasks to train on")
        return draw({"heldout": self._tasks}, split, count, seed)

    def reset(self, task: Task) -> PrivacyLensEpisode:
        """A fresh episode."""
        return PrivacyLensEpisode(case_of(task))


def _task(case: Case) -> Task:
    return Task(case.name, "benign", "heldout", case)
