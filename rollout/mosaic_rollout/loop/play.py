"""The plan-check-act loop: one episode, played turn by turn until it ends or a limit cuts it off.

How a policy is asked for a turn and shown what followed is a backend's: in tokens (agent_loop.py), which
training needs, or in text from an OpenAI-compatible endpoint (chat_agent.py), for evaluation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mosaic_rollout.loop.tools import EpisodeTools
from mosaic_rollout.types import Dialogue, Episode, Status, Step, Verdict


@dataclass(frozen=True)
class Limits:
    """Where an episode is cut off. Cut off means status `truncated`; it is judged as it stands."""

    max_steps: int
    max_step_tokens: int  # sampled tokens of one turn
    max_rollout_tokens: int  # tokens of the whole rollout, prompt and observations included


@dataclass(frozen=True)
class PolicyTurn:
    """What the policy said in one turn, read as steps that are not yet carried out, one or more."""

    steps: tuple[Step, ...]
    cut_off: bool = False  # it ran into its token limit


class Play(ABC):
    """An episode while it is being played: its tools, its steps so far, and the backend's conversation."""

    def __init__(self, episode: Episode, limits: Limits, tool_timeout_s: float) -> None:
        self.episode, self.limits = episode, limits
        self.tools = EpisodeTools(episode, tool_timeout_s)
        self.steps: list[Step] = []

    @abstractmethod
    def room(self) -> int:
        """How many tokens the next turn may have; below 1 the episode is cut off."""

    @abstractmethod
    async def turn(self, max_new_tokens: int) -> PolicyTurn | None:
        """The policy's next turn; None where the conversation does not fit the model's context."""

    @abstractmethod
    def show(self, steps: Sequence[Step]) -> bool:
        """Continue the conversation with what followed a turn's steps; False where that does not fit."""

    def new_tools(self) -> str:
        """Tools that came in mid-episode, as text below what follows a step."""
        return self.tools.new_text()

    async def finish(self) -> tuple[Status, Verdict]:
        """Play to the end: how it ended, and the environment's verdict."""
        return await self.tools.verdict(*await self._end())

    async def follow(self, step: Step) -> str | None:
        """Carry out a step and return what the policy is shown next; None where the episode ends with it.

        That is a tool's output after a call, or the user's next message after an answer.
        """
        if step.action == "tool_call" and step.call is not None:
            return (await self.tools.observe(step.call)).content + self.new_tools()
        if step.action == "answer" and isinstance(self.episode, Dialogue) and await self.tools.settle():
            message = self.episode.next_user_message(step.answer or "")
            if message is not None:
                return message + self.new_tools()
        return None

    async def _end(self) -> tuple[Status, str | None]:
        """Play to the end: how it ended, and the final answer if there is one."""
        while len(self.steps) < self.limits.max_steps:
            room = self.room()
            turn = await self.turn(room) if room >= 1 else None
            if turn is None:
                break
            if turn.cut_off:
                self.steps += turn.steps
                break
            first = len(self.steps)
            for step in turn.steps:
                following = await self.follow(step)
                self.steps.append(replace(step, observation=following))
                if following is None:
                    return _ending(step)
            if len(self.steps) >= self.limits.max_steps or not self.show(self.steps[first:]):
                break
        return "truncated", None


def _ending(step: Step) -> tuple[Status, str | None]:
    """The status and final answer of an episode that ends with this step."""
    if step.action == "answer":
        return "answered", step.answer
    return ("refused" if step.action == "refusal" else "malformed"), None
