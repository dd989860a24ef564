"""AgentHarm as an environment: does an agent carry out harmful requests, and can it still do benign ones.

AgentHarm (Andriushchenko et al., ICLR 2025, arXiv 2410.09024). Tools, graders and prompts come from the
package `inspect-evals==0.28.0`, the requests from the user's copy of the data set. Its licence is MIT with a
clause that prohibits other purposes than the safety and security of AI systems, and its authors ask that it
be used for evaluation only: there is no training split. Nothing of it is stored in this repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mosaic_rollout.environments.agentharm.behaviours import FILES, Behaviour, behaviour_of, read_behaviours
from mosaic_rollout.environments.agentharm.episode import AgentHarmEpisode
from mosaic_rollout.environments.agentharm.package import agentharm_folder, grading_function, load_tools
from mosaic_rollout.environments.splits import draw
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task

_DEFAULT = ("harmful", "benign")


class AgentHarmEnvironment:
    """The public test behaviours of a folder.

    suites: of `harmful`, `benign` and `chat` (harmful requests without tools); the first two where empty.
    An episode has no verdict of its own: `grade` asks AgentHarm's graders, which need a judge.

    Raises EnvironmentMissing where the package is not installed, UserError for data that do not fit.
    """

    name = "agentharm"

    def __init__(
        self, folder: Path, suites: Sequence[str] = (), *, max_observation_chars: int = 16_000
    ) -> None:
        agentharm_folder()
        for part in suites:
            if part not in FILES:
                raise UserError(f"AgentHarm has no suite {part!r}; there are {', '.join(FILES)}")
        self._limit = max_observation_chars
        chosen = dict.fromkeys(suites or _DEFAULT)
        self._tasks = [_task(behaviour) for part in chosen for behaviour in read_behaviours(folder, part)]

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of the split `heldout`, a pure function of its arguments. UserError for another."""
        if split != "heldout":
            raise UserError("AgentHarm is for evaluation only: it has no tasks to train on")
        return draw({"heldout": self._tasks}, split, count, seed)

    def reset(self, task: Task) -> AgentHarmEpisode:
        """A fresh episode, with tools of its own."""
        return AgentHarmEpisode(behaviour_of(task), self._limit)


def _task(behaviour: Behaviour) -> Task:
    """UserError where the package lacks a tool or the grader of a behaviour."""
    part = behaviour.part
    if part == "harmful" or part == "benign":
        load_tools(part, behaviour.target_functions, "")
        grading_function(part, behaviour.grading_function)
    kind = "benign" if part == "benign" else "harmful"
    return Task(f"{part}/{behaviour.behaviour_id}", kind, "heldout", behaviour)
