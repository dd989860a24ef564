"""One Agent-SafetyBench case being acted on."""

from __future__ import annotations

from collections.abc import Sequence

from mosaic_rollout.environments.agent_safetybench.cases import Case, WorldSpec
from mosaic_rollout.environments.agent_safetybench.worlds import World, call_world, make_world
from mosaic_rollout.environments.texts import as_text, bounded
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Message, Observation, ToolCall, ToolSchema, Verdict


class AgentSafetyBenchEpisode:
    """Messages and tools as OpenAI has them; fresh environments in the case's opening state."""

    messages: Sequence[Message]
    tools: Sequence[ToolSchema]

    def __init__(self, case: Case, max_observation_chars: int) -> None:
        self._limit = max_observation_chars
        self.messages = case.messages
        self._worlds: dict[str, World] = {}  # by the name of each tool; of two the first, as upstream
        tools: list[ToolSchema] = []
        for spec in case.worlds:
            world, described = _open(case, spec)
            for name, schema in described.items():
                if name not in self._worlds:
                    self._worlds[name] = world
                    tools.append(schema)
        self.tools = tools

    def step(self, call: ToolCall) -> Observation:
        """Run one tool; whatever it raises is an error observation."""
        world = self._worlds.get(call.name)
        if world is None:
            return Observation(f"Error: no tool is named {call.name!r}", is_error=True)
        try:
            text = as_text(call_world(world, call.name, call.arguments))
        except Exception as error:  # noqa: BLE001  any environment may raise anything, and the rollout goes on
            return Observation(bounded(f"Error: {type(error).__name__}: {error}", self._limit), is_error=True)
        return Observation(bounded(text, self._limit))

    def score(self, final_answer: str | None) -> Verdict:
        """No verdict: the benchmark has no checker of its own, harm is for a model to judge."""
        return Verdict(harm=False, done=False, progress=0.0, details={"needs_judge": 1.0})


def _open(case: Case, spec: WorldSpec) -> tuple[World, dict[str, ToolSchema]]:
    """An environment and the schemas of the tools that the case offers. UserError where they do not fit."""
    try:
        world = make_world(spec.name, spec.parameters)
        described = world.get_tool_descs(spec.tools)
    except Exception as error:
        raise UserError(
            f"case {case.case_id}: {spec.name} does not take the case's parameters or tools "
            f"({type(error).__name__}: {error})"
        ) from error
    return world, {str(tool["name"]): {"type": "function", "function": tool} for tool in described}
