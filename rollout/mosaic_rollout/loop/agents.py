"""Episodes of agents that are programs: each asks the policy by an endpoint, and becomes a rollout.

What was asked and sampled is known token by token (serving/history.py). Answers that go on from one another
are one context; where a program compacted its conversation, branched it or asks about something else, another
begins. Every answer is trained in the first context that has it, and is context in the others.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.environments.agent import ERRORS, MODEL, AgentEnvironment
from mosaic_rollout.errors import UserError
from mosaic_rollout.loop.play import Limits
from mosaic_rollout.loop.step import read_step
from mosaic_rollout.loop.tools import UNRESOLVED_VERDICT
from mosaic_rollout.serving.history import History, SampledTurn
from mosaic_rollout.serving.service import EpisodeRules, Service, Session
from mosaic_rollout.types import Engine, Rollout, Status, Step, Task, Verdict


async def play_agents(
    environment: AgentEnvironment,
    engine: Engine,
    chat: Chat,
    limits: Limits,
    temperature: float,
    tasks: Sequence[Task],
    *,
    group_size: int,
    seed: int,
    group_ids: Sequence[int],
) -> list[list[Rollout]]:
    """A group of episodes a task, all at once, behind one server. UserError as of AgentEnvironment.run."""
    try:
        from mosaic_rollout.serving.app import Access, bound, chat_app, running
    except ImportError as error:
        raise UserError(
            f"env.name {environment.name!r} needs {error.name}: pip install 'mosaic-fast[serve]'"
        ) from None
    service = Service(engine, chat, MODEL, limits.max_rollout_tokens, limits.max_step_tokens)
    access = Access()

    async def episode(task: Task, group_id: int, rollout_id: int) -> Rollout:
        rules = EpisodeRules(temperature, seed, rollout_id, group_id, limits.max_steps)
        session, key = Session(History(chat), rules), secrets.token_urlsafe(24)
        access.by_key[key] = session
        try:
            verdict = await environment.run(task, url, key)
        finally:
            session.close()
            del access.by_key[key]
        if verdict is not None and verdict.details[ERRORS] and not (session.history.turns or session.refused):
            raise environment.never_asked(task)
        return rollout_of(session, chat, task, verdict)

    async with running(chat_app(service, access), bound("127.0.0.1", 0)) as url:
        groups = [
            [episode(task, group_id, group_id * group_size + member) for member in range(group_size)]
            for task, group_id in zip(tasks, group_ids, strict=True)
        ]
        return list(await asyncio.gather(*(asyncio.gather(*group) for group in groups)))


def rollout_of(session: Session, chat: Chat, task: Task, verdict: Verdict | None) -> Rollout:
    """An episode that has ended, as a rollout. verdict: None where it had to be ended."""
    turns, rules = session.history.turns, session.rules
    assert rules is not None, "an episode has rules"
    paths = contexts(turns)
    ids = [path[-1].token_ids for path in paths] or [np.zeros(0, np.int64)]
    starts = np.cumsum([0, *map(len, ids)])
    trained = np.zeros(starts[-1], np.bool_)
    logprobs = np.zeros(starts[-1], np.float32)
    steps: list[Step] = []
    trained_turns: set[SampledTurn] = set()
    for path, start in zip(paths, starts.tolist(), strict=False):
        for turn, following in zip(path, [*path[1:], None], strict=True):
            if turn in trained_turns:
                continue
            trained_turns.add(turn)
            begin = start + len(turn.prompt.token_ids)
            span = slice(begin, begin + len(turn.completion.token_ids))
            trained[span], logprobs[span] = True, turn.completion.logprobs
            steps.append(_step(chat, turn, begin, following))
    opening = turns[0].prompt if turns else None
    return Rollout(
        rollout_id=rules.rollout_id,
        group_id=rules.group_id,
        task=task,
        token_ids=np.concatenate(ids),
        trained=trained,
        rollout_logprobs=logprobs,
        steps=tuple(steps),
        status=_status(session, chat, verdict),
        verdict=UNRESOLVED_VERDICT if verdict is None else verdict,
        messages=opening.messages if opening else (),
        shown_messages=tuple(opening.talk.messages) if opening else (),
        shown_tools=tuple(opening.talk.tools) if opening else (),
        policy_version=turns[-1].completion.policy_version if turns else -1,
        prompt_tokens=sum(turn.completion.prompt_tokens for turn in turns),
        cached_tokens=sum(turn.completion.cached_tokens for turn in turns),
        contexts=tuple(starts[1:-1].tolist()),
    )


def contexts(turns: Sequence[SampledTurn]) -> list[list[SampledTurn]]:
    """The answers from each conversation's first to its last; one that others go on from is no last."""
    inner = {turn.prompt.parent for turn in turns}
    paths = []
    for last in turns:
        if last in inner:
            continue
        path, turn = [], last
        while turn is not None:
            path.append(turn)
            turn = turn.prompt.parent
        paths.append(path[::-1])
    return paths


def _step(chat: Chat, turn: SampledTurn, begin: int, following: SampledTurn | None) -> Step:
    ids = turn.completion.token_ids.tolist()
    step = read_step(chat, ids, begin, turn.prompt.think_is_open, turn.prompt.tools)
    if turn.answer.calls and step.call is None:  # several, of which the grammar takes none
        step = replace(step, action="tool_call", call=turn.answer.calls[0][1])
    return replace(step, observation=following.prompt.following if following else None)


def _status(session: Session, chat: Chat, verdict: Verdict | None) -> Status:
    """How an episode ended: cut short, or as its last answer was, which may be a call that ends it."""
    turns = session.history.turns
    if verdict is None or session.refused or not turns or turns[-1].completion.finish_reason == "length":
        return "truncated"
    action = _step(chat, turns[-1], 0, None).action
    return "refused" if action == "refusal" else "malformed" if action == "malformed" else "answered"
