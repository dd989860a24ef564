"""The plan-check-act loop in tokens: groups of rollouts of one task, sampled from its prompt or forked.

Token in, token out: what the engine sampled is kept as it is, and observations are appended as token ids.

Branching says where rollouts of a group fork: one trunk is sampled to its end, its siblings start from a
prefix of it. A fork costs no prefill, since the prefix is in the engine's radix cache, and it puts the
difference between two rollouts where the judge's preference is to act: at the check, or at a step the policy
was unsure of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.grammar import REFUSAL_SCHEMA
from mosaic_rollout.environments.agent import AgentEnvironment
from mosaic_rollout.loop.agents import play_agents
from mosaic_rollout.loop.play import Limits, Play, PolicyTurn
from mosaic_rollout.loop.step import read_step
from mosaic_rollout.types import (
    Completion,
    Engine,
    Environment,
    Episode,
    Gate,
    Request,
    Rollout,
    SamplingParams,
    Step,
    Task,
)

Branching = Literal["independent", "fork_at_check", "fork_at_step"]


def trunk_count(branching: Branching, group_size: int, gate_contrast: bool = False) -> int:
    """How many rollouts of a group are sampled from the prompt: all, one of two, or one of four."""
    if branching == "independent":
        return group_size
    return max(1, group_size // (4 if gate_contrast else 2))


def fork_position(trunk: Rollout, branching: Branching, seed: int) -> int | None:
    """Token index [0, L) from which a sibling differs; None where the trunk offers no such place.

    fork_at_check: right after the plan of one of its steps, drawn evenly.
    fork_at_step: before the first token of a step, drawn in proportion to the mean surprisal of its tokens.
    """
    if branching == "fork_at_check":
        starts = [(step.check_start, step.end) for step in trunk.steps]
        places = [start for start, end in starts if start is not None and start < end]
        weights = np.ones(len(places))
    else:
        places = [step.prompt_end for step in trunk.steps]
        surprisal = [-trunk.rollout_logprobs[step.prompt_end : step.end].mean() for step in trunk.steps]
        weights = np.asarray(surprisal, dtype=np.float64) + 1e-6
    if not places:
        return None
    random = np.random.default_rng([seed, trunk.rollout_id])
    return int(places[random.choice(len(places), p=weights / weights.sum())])


REDRAWS = 64
"""Draws at a gate until one does not begin with the tag; where even the last one does, it is kept."""


@dataclass(frozen=True)
class AgentLoop:
    """Plays tasks of one environment with one engine. Holds no state of its own between rollouts."""

    engine: Engine
    chat: Chat
    environment: Environment
    limits: Limits
    temperature: float = 1.0
    tool_timeout_s: float = 0.0  # 0: tools run in place, without a limit

    async def groups(
        self,
        tasks: Sequence[Task],
        *,
        group_size: int,
        branching: Branching,
        seed: int,
        gate_contrast: bool = False,
        group_ids: Sequence[int] | None = None,
    ) -> list[list[Rollout]]:
        """A group of rollouts a task, all played at once. Same arguments and weights, same rollouts.

        gate_contrast: siblings of a trunk fork at one of its gates, some with the check and some without.
        group_ids: of the tasks, where they are some of a step's; draws go by them. None: 0, 1, ...
        """
        numbers = group_ids or range(len(tasks))
        if isinstance(self.environment, AgentEnvironment):
            return await play_agents(
                self.environment, self.engine, self.chat, self.limits, self.temperature, tasks,
                group_size=group_size, seed=seed, group_ids=numbers,
            )  # fmt: skip
        plays = [
            self._group(group_id, task, group_size, branching, seed, gate_contrast)
            for group_id, task in zip(numbers, tasks, strict=True)
        ]
        return list(await asyncio.gather(*plays))

    async def _group(
        self, group_id: int, task: Task, group_size: int, branching: Branching, seed: int, gate_contrast: bool
    ) -> list[Rollout]:
        first_id = group_id * group_size
        trunks = trunk_count(branching, group_size, gate_contrast)
        ids = range(first_id, first_id + trunks)
        rollouts = list(await asyncio.gather(*(self._play(task, group_id, i, seed) for i in ids)))
        if gate_contrast:
            rollouts = [self._with_gate(trunk, fork_position(trunk, branching, seed)) for trunk in rollouts]
        siblings: list[Coroutine[None, None, Rollout | None]] = []
        for i in range(first_id + trunks, first_id + group_size):
            trunk = rollouts[(i - first_id) % trunks]
            if trunk.gate is None:
                position, gate = fork_position(trunk, branching, seed + i), None
            else:
                position = trunk.gate.position
                other_side = (i - first_id) // trunks % 2 == 1
                gate = replace(trunk.gate, opened=trunk.gate.opened != other_side)
            if position is None:
                siblings.append(self._play(task, group_id, i, seed))
            else:
                siblings.append(self._fork(trunk, position, gate, i, seed))
        played = await asyncio.gather(*siblings)
        refused = [first_id + trunks + n for n, sibling in enumerate(played) if sibling is None]
        anew = iter(await asyncio.gather(*(self._play(task, group_id, i, seed) for i in refused)))
        return rollouts + [sibling or replace(next(anew), fork_refused=True) for sibling in played]

    def _with_gate(self, trunk: Rollout, position: int | None) -> Rollout:
        """The trunk with the gate at `position`, where it went by its own choice."""
        if position is None:
            return trunk
        start = max(step.prompt_end for step in trunk.steps if step.prompt_end <= position)
        tag = self.chat.tag_after(trunk.token_ids[start:position].tolist())
        if tag is None or position + len(tag) >= self.limits.max_rollout_tokens:
            return trunk
        return replace(
            trunk, gate=Gate(trunk.rollout_id, position, tag, _begins_with(trunk.token_ids[position:], tag))
        )

    async def _play(self, task: Task, group_id: int, rollout_id: int, seed: int) -> Rollout:
        """A rollout from the prompt on."""
        play = TokenPlay(self, self.environment.reset(task), seed, rollout_id, group_id)
        return await self.finished(play, task)

    async def _fork(
        self, trunk: Rollout, position: int, gate: Gate | None, rollout_id: int, seed: int
    ) -> Rollout | None:
        """A rollout from a trunk's first `position` tokens on, in an episode in which they hold as well.

        None where they do not: its environment showed something else than the trunk's when the same was done.
        """
        play = TokenPlay(self, self.environment.reset(trunk.task), seed, rollout_id, trunk.group_id)
        if not await play.inherit(trunk, position):
            return None
        if gate is not None:
            play.decide(gate)
        rollout = await self.finished(play, trunk.task)
        if gate is not None:
            gate = replace(gate, opened=_begins_with(rollout.token_ids[gate.position :], gate.tag))
        return replace(rollout, parent_id=trunk.rollout_id, fork_position=position, gate=gate)

    async def finished(self, play: TokenPlay, task: Task) -> Rollout:
        """An episode played to its end, and judged."""
        status, verdict = await play.finish()
        return Rollout(
            rollout_id=play.rollout_id,
            group_id=play.group_id,
            task=task,
            token_ids=np.concatenate(play.token_ids),
            trained=np.concatenate(play.trained),
            rollout_logprobs=np.concatenate(play.logprobs),
            steps=tuple(play.steps),
            status=status,
            verdict=verdict,
            messages=tuple(play.episode.messages),
            shown_messages=play.shown_messages,
            shown_tools=play.shown_tools,
            policy_version=play.policy_version,
            prompt_tokens=play.prompt_tokens,
            cached_tokens=play.cached_tokens,
            tool_errors=play.tools.errors,
        )


class TokenPlay(Play):
    """An episode played in tokens: those of the rollout so far, in pieces that end where a turn does.

    A subclass gives turns of its own instead of sampled ones (demonstrated.py).
    """

    def __init__(self, loop: AgentLoop, episode: Episode, seed: int, rollout_id: int, group_id: int) -> None:
        super().__init__(episode, loop.limits, loop.tool_timeout_s)
        self._loop, self._seed = loop, seed
        self.rollout_id, self.group_id = rollout_id, group_id
        self._talk = loop.chat.conversation(episode.messages, [*episode.tools, REFUSAL_SCHEMA])
        self.shown_messages, self.shown_tools = tuple(self._talk.messages), tuple(self._talk.tools)
        prompt, self._think_is_open = self._talk.prompt
        self.token_ids: list[np.ndarray] = []
        self.trained: list[np.ndarray] = []
        self.logprobs: list[np.ndarray] = []
        self.policy_version = -1
        self.prompt_tokens = self.cached_tokens = self._length = 0
        self._append(prompt)
        self._turn_start = self._length
        self._avoided: tuple[int, ...] = ()  # what the next draw must not begin with

    @property
    def chat(self) -> Chat:
        return self._loop.chat

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self._length

    async def inherit(self, trunk: Rollout, position: int) -> bool:
        """Start from the trunk's first `position` tokens; its finished tool calls are carried out again.

        False where the environment then shows another opening or another observation than it did before
        (time, chance, a simulated user): the tokens would tell of a world that is not this one's.
        """
        finished = [step for step in trunk.steps if step.end < position]
        if not np.array_equal(self.token_ids[0], trunk.token_ids[: trunk.steps[0].prompt_end]):
            return False
        for step in finished:
            if step.observation is None or await self.follow(step) != step.observation:
                return False
            self._rendered(step)
        self.steps = list(finished)
        self.token_ids = [trunk.token_ids[:position]]
        self.trained = [trunk.trained[:position]]
        self.logprobs = [trunk.rollout_logprobs[:position]]
        self._length = position
        self.policy_version = trunk.policy_version
        self._turn_start = trunk.steps[len(finished)].prompt_end
        return True

    def decide(self, gate: Gate) -> None:
        """Stand at a gate and go through it on the side that the gate says."""
        if gate.opened:
            self._append(np.asarray(gate.tag, dtype=np.int64), np.zeros(len(gate.tag), np.float32))
        else:
            self._avoided = gate.tag

    def room(self) -> int:
        turn_tokens = self._length - self._turn_start  # more than 0 only in the first turn after a fork
        return min(self.limits.max_step_tokens - turn_tokens, self.limits.max_rollout_tokens - self._length)

    async def turn(self, max_new_tokens: int) -> PolicyTurn | None:
        finished = await self._sample(max_new_tokens)
        return PolicyTurn((self._parse(),), cut_off=not finished)

    def show(self, steps: Sequence[Step]) -> bool:
        (step,) = steps
        ids = self._rendered(step)
        if self._length + len(ids) >= self.limits.max_rollout_tokens:
            return False
        self._append(ids)
        self._turn_start = self._length
        return True

    def _rendered(self, step: Step) -> np.ndarray:
        """What followed a step as token ids [N] int64, up to where the policy's next turn begins."""
        text = step.observation or ""
        if step.call is not None:
            ids, self._think_is_open = self._talk.observation(text, step.call.name)
        else:
            ids, self._think_is_open = self._talk.user_message(text)
        return ids

    async def _sample(self, max_new_tokens: int) -> bool:
        """Sample and append the rest of the turn; False where it ran into its token limit."""
        if self._avoided and max_new_tokens > len(self._avoided):
            avoided, self._avoided = self._avoided, ()
            if await self._sample_other_than(avoided):
                return True
            max_new_tokens -= len(avoided)
        return self._take(await self._generate(max_new_tokens, self._seed))

    async def _sample_other_than(self, avoided: tuple[int, ...]) -> bool:
        """As many tokens as `avoided` has, drawn again while they are just these; True where the turn ends.

        That is the policy's distribution given that it does not begin with `avoided`. After REDRAWS draws the
        policy all but never does otherwise, and the last draw is kept.
        """
        completion = await self._generate(len(avoided), self._seed)
        for attempt in range(1, REDRAWS):
            if not _begins_with(completion.token_ids, avoided):
                break
            completion = await self._generate(len(avoided), self._seed + (attempt << 32))
        return self._take(completion)

    async def _generate(self, max_new_tokens: int, seed: int) -> Completion:
        loop = self._loop
        request = Request(
            token_ids=np.concatenate(self.token_ids),
            sampling=SamplingParams(max_new_tokens, loop.temperature, loop.chat.stop_token_ids),
            seed=seed,
            rollout_key=self.rollout_id,
            group_key=self.group_id,
        )
        (completion,) = await loop.engine.generate([request])
        return completion

    def _take(self, completion: Completion) -> bool:
        """Append what was sampled; False where it ran into its token limit."""
        self._append(completion.token_ids, completion.logprobs)
        self.policy_version = completion.policy_version
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        return completion.finish_reason == "stop"

    def _append(self, token_ids: np.ndarray, logprobs: np.ndarray | None = None) -> None:
        """Append tokens that the policy sampled with these log-probs; without, that it was shown."""
        count = len(token_ids)
        self.token_ids.append(token_ids)
        self.trained.append(np.full(count, logprobs is not None))
        self.logprobs.append(np.zeros(count, np.float32) if logprobs is None else logprobs)
        self._length += count

    def _parse(self) -> Step:
        """The step that the tokens since `_turn_start` make, not yet carried out."""
        ids = np.concatenate(self.token_ids)[self._turn_start :].tolist()
        tools = [*self.episode.tools, REFUSAL_SCHEMA]
        return read_step(self._loop.chat, ids, self._turn_start, self._think_is_open, tools)


def _begins_with(token_ids: np.ndarray, tag: tuple[int, ...]) -> bool:
    return tuple(token_ids[: len(tag)].tolist()) == tag
