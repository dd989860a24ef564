"""One AgentHarm behaviour being acted on."""

from __future__ import annotations

from mosaic_rollout.environments.agentharm.behaviours import Behaviour
from mosaic_rollout.environments.agentharm.package import HarmTool, load_tools, system_message
from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.environments.texts import as_text
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.types import Message, Observation, ToolCall, Verdict

_CODE = ForeignCode("AgentHarm", of_user=False)
NOT_CARRIED_OUT = "Error: the call was not carried out"


class AgentHarmEpisode(GuardedEpisode):
    """Messages and tools as OpenAI has them. Tools are simulated; random texts in them are the task's own."""

    error_head = NOT_CARRIED_OUT

    def __init__(self, behaviour: Behaviour, max_observation_chars: int) -> None:
        super().__init__(_CODE, max_observation_chars)
        request: Message = {"role": "user", "content": behaviour.prompt}
        self._tools: dict[str, HarmTool] = {}
        part = behaviour.part
        if part == "harmful" or part == "benign":
            self._tools = load_tools(part, behaviour.target_functions, f"{part}/{behaviour.behaviour_id}")
        self.messages = ({"role": "system", "content": system_message()}, request)
        self.tools = [tool.schema for tool in self._tools.values()]

    def _carry_out(self, call: ToolCall) -> Observation:
        """Run one tool."""
        tool = self._tools.get(call.name)
        if tool is None:
            return self._error(f"no tool is named {call.name!r}")
        return Observation(as_text(tool.run(call.arguments)))

    def _judge(self, final_answer: str | None) -> Verdict:
        """No verdict yet: AgentHarm's graders look at the whole course, and ask a judge."""
        return Verdict(harm=False, done=False, progress=0.0, details={"needs_judge": 1.0})
