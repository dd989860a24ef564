"""The plan-check-act loop: one episode played by the policy, token in, token out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.grammar import REFUSAL_SCHEMA, Turn, parse_turn
from mosaic_rollout.loop.branching import Branching, fork_position, trunk_count
from mosaic_rollout.loop.tools import EpisodeTools
from mosaic_rollout.types import (
    Completion,
    Dialogue,
    Engine,
    Environment,
    Episode,
    Gate,
    Request,
    Rollout,
    SamplingParams,
    Status,
    Step,
    Task,
)

REDRAWS = 64
"""Draws at a gate until one does not begin with the tag; where even the last one does, it is kept."""


@dataclass(frozen=True)
class Limits:
    """Where an episode is cut off. Cut off means status `truncated`; it is judged as it stands."""

    max_steps: int
    max_step_tokens: int  # sampled tokens of one turn
    max_rollout_tokens: int  # tokens of the whole rollout, prompt and observations included


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
        plays = [
            self._group(group_id, task, group_size, branching, seed, gate_contrast)
            for group_id, task in zip(group_ids or range(len(tasks)), tasks, strict=True)
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
        walk = _Walk(self, self.environment.reset(task), seed, rollout_id, group_id)
        return await self._finished(walk, task)

    async def _fork(
        self, trunk: Rollout, position: int, gate: Gate | None, rollout_id: int, seed: int
    ) -> Rollout | None:
        """A rollout from a trunk's first `position` tokens on, in an episode in which they hold as well.

        None where they do not: its environment showed something else than the trunk's when the same was done.
        """
        walk = _Walk(self, self.environment.reset(trunk.task), seed, rollout_id, trunk.group_id)
        if not await walk.inherit(trunk, position):
            return None
        if gate is not None:
            walk.decide(gate)
        rollout = await self._finished(walk, trunk.task)
        if gate is not None:
            gate = replace(gate, opened=_begins_with(rollout.token_ids[gate.position :], gate.tag))
        return replace(rollout, parent_id=trunk.rollout_id, fork_position=position, gate=gate)

    async def _finished(self, walk: _Walk, task: Task) -> Rollout:
        """A walk played to its end, and judged."""
        status, verdict = await walk.tools.verdict(*await walk.run())
        return Rollout(
            rollout_id=walk.rollout_id,
            group_id=walk.group_id,
            task=task,
            token_ids=np.concatenate(walk.token_ids),
            trained=np.concatenate(walk.trained),
            rollout_logprobs=np.concatenate(walk.logprobs),
            steps=tuple(walk.steps),
            status=status,
            verdict=verdict,
            messages=tuple(walk.episode.messages),
            shown_messages=walk.shown_messages,
            shown_tools=walk.shown_tools,
            policy_version=walk.policy_version,
            prompt_tokens=walk.prompt_tokens,
            cached_tokens=walk.cached_tokens,
            token_versions=np.concatenate(walk.versions),
            tool_errors=walk.tools.errors,
        )


class _Walk:
    """A rollout while it is being played: the tokens so far, in pieces, and the steps they were parsed to."""

    def __init__(self, loop: AgentLoop, episode: Episode, seed: int, rollout_id: int, group_id: int) -> None:
        self._loop, self._seed, self.episode = loop, seed, episode
        self.rollout_id, self.group_id = rollout_id, group_id
        self.tools = EpisodeTools(episode, loop.tool_timeout_s)
        self._talk = loop.chat.conversation(episode.messages, [*episode.tools, REFUSAL_SCHEMA])
        self.shown_messages, self.shown_tools = tuple(self._talk.messages), tuple(self._talk.tools)
        prompt, self._think_is_open = self._talk.prompt
        self.token_ids: list[np.ndarray] = [prompt]
        self.trained: list[np.ndarray] = [np.zeros(len(prompt), dtype=bool)]
        self.logprobs: list[np.ndarray] = [np.zeros(len(prompt), dtype=np.float32)]
        self.versions: list[np.ndarray] = [np.full(len(prompt), -1, np.int64)]  # that made each token
        self.steps: list[Step] = []
        self.policy_version = -1
        self.prompt_tokens = self.cached_tokens = 0
        self._length = len(prompt)
        self._turn_start = self._length
        self._avoided: tuple[int, ...] = ()  # what the next draw must not begin with

    async def inherit(self, trunk: Rollout, position: int) -> bool:
        """Start from the trunk's first `position` tokens; its finished tool calls are carried out again.

        False where the environment then shows another opening or another observation than it did before
        (time, chance, a simulated user): the tokens would tell of a world that is not this one's.
        """
        finished = [step for step in trunk.steps if step.end < position]
        if not np.array_equal(self.token_ids[0], trunk.token_ids[: trunk.steps[0].prompt_end]):
            return False
        for step in finished:
            following = await self._follow(step)
            if following is None or following[0] != step.observation:
                return False
        self.steps = list(finished)
        self.token_ids = [trunk.token_ids[:position]]
        self.trained = [trunk.trained[:position]]
        self.logprobs = [trunk.rollout_logprobs[:position]]
        self.versions = [_versions(trunk)[:position]]
        self._length = position
        self.policy_version = trunk.policy_version
        self._turn_start = trunk.steps[len(finished)].prompt_end
        return True

    def decide(self, gate: Gate) -> None:
        """Stand at a gate and go through it on the side that the gate says."""
        if not gate.opened:
            self._avoided = gate.tag
            return
        count = len(gate.tag)
        self._append(
            np.asarray(gate.tag, dtype=np.int64),
            np.ones(count, dtype=bool),
            np.zeros(count, np.float32),
            np.full(count, self.policy_version, np.int64),
        )

    async def run(self) -> tuple[Status, str | None]:
        """Play to the end: how it ended, and the final answer if there is one."""
        limits = self._loop.limits
        while True:
            turn_tokens = self._length - self._turn_start  # more than 0 only in the first turn after a fork
            budget = min(limits.max_step_tokens - turn_tokens, limits.max_rollout_tokens - self._length)
            if budget < 1:
                return "truncated", None
            finished = await self._sample(budget)
            step = self._parse()
            if not finished:
                self.steps.append(step)
                return "truncated", None
            following = await self._follow(step)
            if following is None:
                self.steps.append(step)
                if step.action == "answer":
                    return "answered", step.answer
                return ("refused" if step.action == "refusal" else "malformed"), None
            text, ids = following
            self.steps.append(replace(step, observation=text))
            if len(self.steps) >= limits.max_steps:
                return "truncated", None
            if self._length + len(ids) >= limits.max_rollout_tokens:
                return "truncated", None
            self._append_observation(ids)
            self._turn_start = self._length

    async def _sample(self, max_new_tokens: int) -> bool:
        """One generation appended to the walk; False where it ran into its token limit."""
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
        count = len(completion.token_ids)
        versions = completion.token_versions
        if versions is None:
            versions = np.full(count, completion.policy_version, np.int64)
        self._append(completion.token_ids, np.ones(count, dtype=bool), completion.logprobs, versions)
        self.policy_version = completion.policy_version
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        return completion.finish_reason == "stop"

    def _append_observation(self, ids: np.ndarray) -> None:
        count = len(ids)
        self._append(
            ids, np.zeros(count, dtype=bool), np.zeros(count, np.float32), np.full(count, -1, np.int64)
        )

    def _append(
        self, token_ids: np.ndarray, trained: np.ndarray, logprobs: np.ndarray, versions: np.ndarray
    ) -> None:
        self.token_ids.append(token_ids)
        self.trained.append(trained)
        self.logprobs.append(logprobs)
        self.versions.append(versions)
        self._length += len(token_ids)

    def _parse(self) -> Step:
        """The step that the tokens since `_turn_start` make, not yet carried out."""
        chat = self._loop.chat
        ids = np.concatenate(self.token_ids)[self._turn_start :].tolist()
        text = chat.turn_text(ids)
        tools = [*self.episode.tools, REFUSAL_SCHEMA]
        turn = parse_turn(text, chat.call_format, think_is_open=self._think_is_open, tools=tools)
        gate = None if turn.plan_span is None else chat.check_start(ids, text, turn.plan_span[1])
        check_start = None if gate is None else self._turn_start + gate
        return _step(turn, text, self._turn_start, self._length, check_start, _safety_tokens(chat, ids, turn))

    async def _follow(self, step: Step) -> tuple[str, np.ndarray] | None:
        """What comes after a step, as text and as token ids; None where the episode ends with it.

        A tool's output after a call, the user's next message after an answer; tools that are new below it.
        """
        episode = self.episode
        if step.action == "tool_call" and step.call is not None:
            text = (await self.tools.observe(step.call)).content + self.tools.new_text()
            ids, self._think_is_open = self._talk.observation(text, step.call.name)
            return text, ids
        if step.action == "answer" and isinstance(episode, Dialogue) and await self.tools.settle():
            message = episode.next_user_message(step.answer or "")
            if message is not None:
                text = message + self.tools.new_text()
                ids, self._think_is_open = self._talk.user_message(text)
                return text, ids
        return None


def _versions(rollout: Rollout) -> np.ndarray:
    """Policy version of each token of a rollout, [L] int64, -1 where not sampled."""
    if rollout.token_versions is not None:
        return rollout.token_versions
    return np.where(rollout.trained, rollout.policy_version, -1)


def _safety_tokens(chat: Chat, ids: list[int], turn: Turn) -> int:
    """Sampled tokens from `<safety_thoughts>` through its closing tag."""
    if turn.check_span is None:
        return 0
    start, end = turn.check_span
    before = chat.tokens_through(ids, start)
    if before and len(chat.decode(ids[:before])) > start:  # the tag's first character shares a token
        before -= 1
    return chat.tokens_through(ids, end) - before


def _step(turn: Turn, text: str, start: int, end: int, check_start: int | None, safety_tokens: int) -> Step:
    return Step(
        prompt_end=start,
        end=end,
        text=text,
        plan=turn.plan,
        check=turn.check,
        action=turn.action,
        call=turn.call,
        answer=turn.answer,
        observation=None,
        safety_tokens=safety_tokens,
        well_formed=turn.well_formed,
        check_start=check_start,
    )


def _begins_with(token_ids: np.ndarray, tag: tuple[int, ...]) -> bool:
    return tuple(token_ids[: len(tag)].tolist()) == tag
