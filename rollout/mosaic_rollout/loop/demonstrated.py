"""Demonstrations as rollouts: the loop in tokens, its turns given instead of sampled.

A demonstrated turn's tokens are those that the policy's chat template writes; all else (prompt, observations,
parsing, the verdict) is the loop of training itself, so a rollout that is trained on by supervised learning
is one that the policy could have sampled.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from mosaic_rollout.chat.grammar import TAGS
from mosaic_rollout.chat.rewriting import said_of
from mosaic_rollout.errors import UserError
from mosaic_rollout.loop.agent_loop import AgentLoop, TokenPlay
from mosaic_rollout.loop.play import PolicyTurn
from mosaic_rollout.types import Demonstrates, Episode, Move, Moves, Rollout, Step, Task

Rewrite: TypeAlias = Callable[[Episode, Sequence[Step], Move], Awaitable[Move]]
"""Writes the plan or check that a move lacks; it is told the episode and the steps before."""


class TooLongError(UserError):
    """A demonstration does not fit a rollout."""


async def demonstrated(
    loop: AgentLoop, task: Task, episode: Episode, rewrite: Rewrite, rollout_id: int = 0
) -> Rollout:
    """The rollout of an episode's own demonstration; its `rollout_logprobs` are all 0.

    The loop's limit on a rollout's tokens holds, those on turns do not. TooLongError where it does not fit,
    UserError for an episode without a demonstration, or one that cannot be written.
    """
    if not isinstance(episode, Demonstrates):
        raise UserError(f"{loop.environment.name} has no demonstrations: its episodes have no demonstrate()")
    play = _DemonstratedPlay(loop, episode, episode.demonstrate(), rewrite, rollout_id)
    rollout = await loop.finished(play, task)
    if play.has_more():
        raise UserError(f"the demonstration of {task.task_id} goes on after the turn that ended its episode")
    return rollout


class _DemonstratedPlay(TokenPlay):
    """An episode played by its demonstration."""

    def __init__(
        self, loop: AgentLoop, episode: Episode, moves: Moves, rewrite: Rewrite, rollout_id: int
    ) -> None:
        super().__init__(loop, episode, 0, rollout_id, rollout_id)
        self._moves: Iterator[Move] | Generator[Move, str, None] = (
            moves if isinstance(moves, Generator) else iter(moves)
        )
        self._rewrite = rewrite
        self._next = next(self._moves, None)
        self._fits(0)

    def has_more(self) -> bool:
        """Whether turns are left that were not played."""
        return self._after("") is not None if self._next is None else True

    def room(self) -> int:
        return 1  # `turn` refuses what does not fit, whose length it knows

    async def turn(self, max_new_tokens: int) -> PolicyTurn | None:
        move, self._next = self._next, None
        if move is None:
            return None
        move = await self._rewrite(self.episode, self.steps, move)
        if any(tag in text for text in (move.plan, move.check, move.answer) if text for tag in TAGS):
            raise UserError(f"a plan, a check or an answer holds a tag of the loop: {move!r:.200}")
        ids = self._talk.turn(said_of(move, self.chat.between_blocks), move.call)
        self._fits(len(ids))
        self._append(ids, np.zeros(len(ids), np.float32) if move.trained else None)
        step = self._parse()
        if step.action == "malformed":
            raise UserError(f"the tokenizer cannot write a turn so that it is read back: {step.text!r:.200}")
        return PolicyTurn((step,))

    def show(self, steps: Sequence[Step]) -> bool:
        """What followed the turn, where another one comes after it."""
        (step,) = steps
        self._next = self._after(step.observation or "")
        if self._next is None:
            return False
        if not super().show(steps):
            self._fits(self.limits.max_rollout_tokens)
        return True

    def _after(self, observation: str) -> Move | None:
        """The next turn of the demonstration, which is told what the policy is shown."""
        try:
            if isinstance(self._moves, Generator):
                return self._moves.send(observation)
            return next(self._moves)
        except StopIteration:
            return None

    def _fits(self, more: int) -> None:
        length, most = self.length + more, self.limits.max_rollout_tokens
        if length > most:
            raise TooLongError(f"it has {length} tokens or more, and a rollout has {most} at most")
