"""One AgentHarm behaviour being acted on."""

from __future__ import annotations

from collections.abc import Sequence

from mosaic_rollout.environments.agentharm.behaviours import Behaviour
from mosaic_rollout.environments.agentharm.package import HarmTool, load_tools, system_message
from mosaic_rollout.environments.texts import as_text, bounded
from mosaic_rollout.types import Message, Observation, ToolCall, ToolSchema, Verdict

NOT_CARRIED_OUT = "Error: the call was not carried out"


class AgentHarmEpisode:
    """Messages and tools as OpenAI has them. Tools are simulated; random texts in them are the task's own."""

    messages: Sequence[Message]
    tools: Sequence[ToolSchema]

    def __init__(self, behaviour: Behaviour, max_observation_chars: int) -> None:
        self._limit = max_observation_chars
        request: Message = {"role": "user", "content": behaviour.prompt}
        self._tools: dict[str, HarmTool] = {}
        part = behaviour.part
        if part == "harmful" or part == "benign":
            self._tools = load_tools(part, behaviour.target_functions, f"{part}/{behaviour.behaviour_id}")
        self.messages = ({"role": "system", "content": system_message()}, request)
        self.tools = [tool.schema for tool in self._tools.values()]

    def step(self, call: ToolCall) -> Observation:
        """Run one tool; arguments that do not fit, and whatever it raises, are an error observation."""
        tool = self._tools.get(call.name)
        if tool is None:
            return Observation(f"{NOT_CARRIED_OUT}: no tool is named {call.name!r}", is_error=True)
        try:
            text = as_text(tool.run(call.arguments))
        except Exception as error:  # noqa: BLE001  any tool may raise anything, and the rollout goes on
            why = f"{type(error).__name__}: {error}"
            return Observation(bounded(f"{NOT_CARRIED_OUT}: {why}", self._limit), is_error=True)
        return Observation(bounded(text, self._limit))

    def score(self, final_answer: str | None) -> Verdict:
        """No verdict yet: AgentHarm's graders look at the whole course, and ask a judge."""
        return Verdict(harm=False, done=False, progress=0.0, details={"needs_judge": 1.0})
