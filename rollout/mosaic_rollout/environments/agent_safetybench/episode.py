"""One Agent-SafetyBench case being acted on."""

from __future__ import annotations

import copy

from mosaic_rollout.environments.agent_safetybench.cases import Case, WorldSpec
from mosaic_rollout.environments.agent_safetybench.worlds import World, call_world, make_world
from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.environments.texts import as_text
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.raised import words
from mosaic_rollout.types import Observation, ToolCall, ToolSchema, Verdict

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
