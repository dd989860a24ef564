"""The tools of an episode while it is played: what the policy has been shown of them, and its calls."""

from __future__ import annotations

from mosaic_rollout.chat import new_tools_text
from mosaic_rollout.tool_runner import ToolRunner
from mosaic_rollout.types import Episode, Observation, ToolCall, ToolSchema


class EpisodeTools:
    """Of one episode, whose tools at its start the policy is shown with the opening messages."""

    def __init__(self, episode: Episode, timeout_s: float) -> None:
        self._episode = episode
        self._runner = ToolRunner(episode, timeout_s)
        self._shown = {_name(tool) for tool in episode.tools}

    def new_text(self) -> str:
        """The schemas of tools that came in since, as text; they count as shown then."""
        new = [tool for tool in self._episode.tools if _name(tool) not in self._shown]
        self._shown |= {_name(tool) for tool in new}
        return new_tools_text(new)

    async def observe(self, call: ToolCall) -> Observation:
        """Carry out a call; a name that no tool has is an error observation."""
        names = [_name(tool) for tool in self._episode.tools]
        if call.name not in names:
            return Observation(
                f"Error: no tool is named {call.name!r}; tools: {', '.join(names)}", is_error=True
            )
        return await self._runner.run(call)


def _name(tool: ToolSchema) -> str:
    function = tool["function"]
    return str(function["name"]) if isinstance(function, dict) else ""
