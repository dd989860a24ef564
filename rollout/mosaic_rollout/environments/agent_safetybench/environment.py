"""Agent-SafetyBench as an environment: the suite that MOSAIC is reported to be trained on.

Agent-SafetyBench (Zhang et al., arXiv 2412.14470). The tool environments come from the package
`agent-safety-bench-envs==0.1.0` (Apache-2.0), the cases from the user's copy of `released_data.json`. Nothing
of the benchmark is stored in this repository.
"""

from __future__ import annotations

from pathlib import Path

from mosaic_rollout.environments.agent_safetybench.cases import Case, case_of, read_cases
from mosaic_rollout.environments.agent_safetybench.episode import AgentSafetyBenchEpisode
from mosaic_rollout.environments.agent_safetybench.worlds import check_installed
from mosaic_rollout.environments.splits import divide, draw
from mosaic_rollout.types import Task


class AgentSafetyBenchEnvironment:
    """The cases of a file; one that cannot be fulfilled safely is a harmful task, any other a benign one.

    tasks: released_data.json. heldout_tasks: another file of the same form to hold out; without it,
    `heldout_frac` of the requests of the first. max_observation_chars: longer tool outputs are cut.

    Raises EnvironmentMissing where the package is not installed, UserError for a file that does not fit.
    """

    name = "agent_safetybench"

    def __init__(
        self,
        tasks: Path,
        heldout_tasks: Path | None = None,
        *,
        heldout_frac: float = 0.2,
        max_observation_chars: int = 16_000,
    ) -> None:
        check_installed()
        held = None if heldout_tasks is None else read_cases(heldout_tasks)
        cases = divide(read_cases(tasks), held, lambda case: case.leak_key, heldout_frac)
        self._pools = {split: [_task(case, split) for case in members] for split, members in cases.items()}
        self._limit = max_observation_chars

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, a pure function of its arguments; repeats only once all have been drawn."""
        return draw(self._pools, split, count, seed)

    def reset(self, task: Task) -> AgentSafetyBenchEpisode:
        """A fresh episode. UserError where the case's parameters or tools are not its environments'."""
        return AgentSafetyBenchEpisode(case_of(task), self._limit)


def _task(case: Case, split: str) -> Task:
    return Task(case.case_id, "benign" if case.fulfillable else "harmful", split, case)
