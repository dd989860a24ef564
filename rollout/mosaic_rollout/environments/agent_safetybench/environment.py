"""One Agent-SafetyBench case being acted on.

Agent-SafetyBench as an environment: the suite that MOSAIC is reported to be trained on.

Agent-SafetyBench (Zhang et al., arXiv 2412.14470). The tool environments come from the package
`agent-safety-bench-envs==0.1.0` (Apache-2.0), the cases from the user's copy of `released_data.json`. Nothing
of the benchmark is stored in this repository.
"""

from __future__ import annotations

import copy
from pathlib import Path

from mosaic_rollout.environments.agent_safetybench.cases import (
    Case,
    World,
    WorldSpec,
    call_world,
    case_of,
    check_installed,
    make_world,
    read_cases,
)
from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.environments.splits import divide, draw
from mosaic_rollout.environments.user_data import as_text
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.raised import words
from mosaic_rollout.types import Observation, Task, ToolCall, ToolSchema, Verdict

_CODE = ForeignCode("Agent-SafetyBench", of_user=False)


class AgentSafetyBenchEpisode(GuardedEpisode):
    """Messages and tools as OpenAI has them; fresh environments in the case's opening state."""

    checks_arguments = False  # the package does, and converts them to the types of its schema

    def __init__(self, case: Case, max_observation_chars: int) -> None:
        super().__init__(_CODE, max_observation_chars)
        self.messages = copy.deepcopy(case.messages)
        self._worlds: dict[str, World] = {}  # by the name of each tool; of two the first, as upstream
        tools: list[ToolSchema] = []
        for spec in case.worlds:
            world, described = _open(case, spec)
            for name, schema in described.items():
                if name not in self._worlds:
                    self._worlds[name] = world
                    tools.append(schema)
        self.tools = tools

    def _carry_out(self, call: ToolCall) -> Observation:
        """Run one tool."""
        world = self._worlds.get(call.name)
        if world is None:
            return self._error(f"no tool is named {call.name!r}")
        return Observation(as_text(call_world(world, call.name, call.arguments)))

    def _judge(self, final_answer: str | None) -> Verdict:
        """No verdict: the benchmark has no checker of its own, harm is for a model to judge."""
        return Verdict(harm=False, done=False, progress=0.0, details={"needs_judge": 1.0})


def _open(case: Case, spec: WorldSpec) -> tuple[World, dict[str, ToolSchema]]:
    """An environment and the schemas of the tools that the case offers. UserError where they do not fit."""
    try:
        world = make_world(spec.name, spec.parameters)
        described = copy.deepcopy(world.get_tool_descs(spec.tools))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(
            f"case {case.case_id}: {spec.name} does not take the case's parameters or tools ({words(error)})"
        ) from error
    return world, {str(tool["name"]): {"type": "function", "function": tool} for tool in described}


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
