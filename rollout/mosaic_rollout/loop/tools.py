"""Tool calls with a time limit: a tool that hangs becomes an observation, not a run that hangs.

The tools of an episode while it is played: what the policy was shown of them, its calls, its verdict.
"""

from __future__ import annotations

import asyncio

from mosaic_rollout.chat.grammar import REFUSAL_TOOL
from mosaic_rollout.chat.messages import new_tools_text
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import checked_verdict
from mosaic_rollout.foreign.code import in_thread
from mosaic_rollout.types import Episode, Observation, Status, ToolCall, ToolSchema, Verdict


class ToolRunner:
    """Runs the calls of one episode, one after the other.

    timeout_s 0: in place, without a limit; the order of calls between rollouts is then a function of the
    run alone, which bitwise repeatable runs need. Above 0: each call in a thread of its own. Python cannot
    stop a thread, so a call that overran goes on; until it ends, later calls are answered with an error
    observation in its place, lest two calls change one episode at a time, and `settle` waits for it.
    """

    def __init__(self, episode: Episode, timeout_s: float) -> None:
        self._episode, self._timeout_s = episode, timeout_s
        self._running: asyncio.Future[Observation] | None = None

    async def run(self, call: ToolCall) -> Observation:
        """Carry out a call; at the limit an error observation that says so."""
        if not self._timeout_s:
            return self._episode.step(call)
        if self._running is None or self._running.done():
            self._running = in_thread(lambda: self._episode.step(call), f"tool {call.name}")
            done, _ = await asyncio.wait({self._running}, timeout=self._timeout_s)
            if done:
                return self._running.result()
            return Observation(
                f"Error: {call.name} did not finish within {self._timeout_s:g} seconds", is_error=True
            )
        return Observation(f"Error: {call.name} was not run, an earlier call is still running", is_error=True)

    async def settle(self) -> bool:
        """Wait for a call that overran, for as long again as any call may take. False where it goes on."""
        if self._running is None or self._running.done():
            return True
        done, _ = await asyncio.wait({self._running}, timeout=self._timeout_s)
        return bool(done)


UNRESOLVED = "unresolved"
"""Detail of a verdict: a call did not end, so that nobody could look."""
UNRESOLVED_VERDICT = Verdict(harm=True, done=False, progress=0.0, details={UNRESOLVED: 1.0})
"""Of an episode with a call that does not end: nobody knows what it does, so what it tried counts as done."""


class EpisodeTools:
    """Of one episode, whose tools at its start the policy is shown with the opening messages.

    UserError for a tool named like `refusal_tool`, which is the loop's.
    """

    def __init__(self, episode: Episode, timeout_s: float) -> None:
        self._episode = episode
        self._runner = ToolRunner(episode, timeout_s)
        self._shown = {_name(tool) for tool in episode.tools}
        self.errors = 0  # calls that were answered with an error observation
        _refuse_refusal_tool(self._shown)

    def new_text(self) -> str:
        """The schemas of tools that came in since, as text; they count as shown then."""
        new = [tool for tool in self._episode.tools if _name(tool) not in self._shown]
        names = {_name(tool) for tool in new}
        _refuse_refusal_tool(names)
        self._shown |= names
        return new_tools_text(new)

    async def observe(self, call: ToolCall) -> Observation:
        """Carry out a call; a name that no tool has is an error observation."""
        names = [_name(tool) for tool in self._episode.tools]
        if call.name in names:
            observation = await self._runner.run(call)
        else:
            observation = Observation(
                f"Error: no tool is named {call.name!r}; tools: {', '.join(names)}", is_error=True
            )
        self.errors += observation.is_error
        return observation

    async def settle(self) -> bool:
        """Wait for a call that overran its limit, for as long again. False where it goes on."""
        return await self._runner.settle()

    async def verdict(self, status: Status, final_answer: str | None) -> tuple[Status, Verdict]:
        """How the episode ended and its verdict, which waits for a call that overran.

        Where that does not end in time, the episode counts as cut short, with the harm it may have tried.
        """
        if not await self.settle():
            return "truncated", UNRESOLVED_VERDICT
        return status, checked_verdict("the environment's verdict", self._episode.score(final_answer))


def _name(tool: ToolSchema) -> str:
    function = tool["function"]
    return str(function["name"]) if isinstance(function, dict) else ""


def _refuse_refusal_tool(names: set[str]) -> None:
    if REFUSAL_TOOL in names:
        raise UserError(
            f"a tool of the environment is named {REFUSAL_TOOL}, which the loop adds itself; rename it"
        )
