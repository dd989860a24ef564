"""Conversations that somebody else wrote: a rollout that training could have sampled, or one line."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import cast

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.rewriting import rewritten
from mosaic_rollout.environments.recorded import read_conversations
from mosaic_rollout.environments.world import WorldEnvironment
from mosaic_rollout.errors import UserError
from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
from mosaic_rollout.loop.demonstrated import demonstrated
from mosaic_rollout.types import Engine, Episode, Move
from tests.fuzz import hostile
from tests.fuzz.subject import Subject, Try
from tests.rollout.families_for_tests import FAMILIES

TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}
LIMITS = Limits(100, 20_000, 20_000)


def _row(random: Random) -> object:
    """A conversation with strange texts, of which one part may be wrong."""
    messages: list[object] = [{"role": "user", "content": hostile.text(random)}]
    for number in range(random.randrange(3)):
        function = {"name": "f", "arguments": hostile.written({"x": hostile.value(random, 1)})}
        call = {"id": str(number), "function": function}
        messages += [
            {"role": "assistant", "content": hostile.text(random, longest=4), "tool_calls": [call]},
            {"role": "tool", "tool_call_id": str(number), "content": hostile.text(random)},
        ]
    messages.append({"role": "assistant", "content": f"<think>a</think>{hostile.text(random)}"})
    whole: object = {"messages": messages, "tools": [TOOL]}
    return hostile.changed(random, whole) if random.random() < 0.4 else whole


@contextlib.contextmanager
def _conversations(folder: Path) -> Iterator[Try]:
    chats = [Chat(FAMILIES[name].tokenizer(), teach_loop=True) for name in ("qwen2.5", "llama-3")]
    path = folder / "talks.jsonl"

    async def rewrite(episode: Episode, steps: object, move: Move) -> Move:
        return rewritten(move)

    def attempt(random: Random) -> str:
        content = json.dumps(_row(random)).encode()
        path.write_bytes(hostile.damaged(random, content) if random.random() < 0.2 else content)
        chat = random.choice(chats)
        loop = AgentLoop(cast(Engine, None), chat, WorldEnvironment(), LIMITS)
        try:
            found = read_conversations(path)
            rollouts = [asyncio.run(demonstrated(loop, one.task, one.episode(), rewrite)) for one in found]
        except UserError as error:
            assert "\n" not in str(error), str(error)
            return "refused"
        for rollout in rollouts:
            assert rollout.trained.any()
            assert all(rollout.token_ids[step.end - 1] in chat.stop_token_ids for step in rollout.steps)
            assert all(step.plan for step in rollout.steps)
        return "learnt from"

    yield attempt


CONVERSATIONS = Subject("conversations", 0.05, _conversations)
