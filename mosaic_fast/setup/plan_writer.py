"""Plans and checks that a demonstration lacks, written by the model that [judge] names, and cached."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, Field

from mosaic_fast.config import JudgeConfig
from mosaic_fast.preferences.llm_calls import AnswerCache, Asker
from mosaic_fast.preferences.load import judge_endpoint
from mosaic_fast.run.folder import PLANS
from mosaic_rollout.chat.grammar import TAGS
from mosaic_rollout.chat.prompts import load_prompt
from mosaic_rollout.chat.rewriting import rewritten
from mosaic_rollout.types import Episode, JsonValue, Move, Step

PROMPT = "plan_v1"


class ThoughtsAnswer(BaseModel):
    """What the model answers."""

    plan: str = Field(min_length=1)
    check: str


class PlanWriter:
    """Asks for what a move lacks; an answer is kept the moment it arrives, so nothing is asked twice.

    Use it as an asynchronous context manager. TrainingError where the endpoint gives no valid answer.
    """

    def __init__(self, config: JudgeConfig, run_folder: Path) -> None:
        endpoint = replace(
            judge_endpoint(config),
            after_failure="No plan was made up; those so far are in the cache: mend it and start again",
            after_limit="; raise it and start again, plans so far are in the cache",
        )
        cache = AnswerCache(Path(config.cache) if config.cache else run_folder / PLANS)
        self._asker = Asker(
            endpoint, cache, max_calls=config.max_calls, max_tokens_total=config.max_total_tokens
        )
        self._room = asyncio.Semaphore(config.max_concurrent)
        self._counts: Counter[str] = Counter()
        self._asked: dict[str, asyncio.Task[ThoughtsAnswer]] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> PlanWriter:
        self._http = await self._stack.enter_async_context(self._asker.endpoint.open())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await self._stack.aclose()

    async def write(self, episode: Episode, steps: Sequence[Step], move: Move) -> Move:
        """The move with a plan, and a check where the model sees a reason for one; what is there is kept."""
        if move.plan is not None:
            return move
        messages = [
            {"role": "system", "content": load_prompt(PROMPT)},
            {"role": "user", "content": json.dumps(_shown(episode, steps, move), ensure_ascii=False)},
        ]
        key = messages[1]["content"]
        if key not in self._asked:  # equal turns are asked for once, also while the answer is under way
            self._asked[key] = asyncio.create_task(self._ask(messages))
        answer = await asyncio.shield(self._asked[key])
        plan, check = _without_tags(answer.plan), _without_tags(answer.check)
        return rewritten(replace(move, plan=plan or None, check=move.check or check or None))

    async def _ask(self, messages: Sequence[dict[str, str]]) -> ThoughtsAnswer:
        async with self._room:
            return await self._asker.ask(self._http, messages, ThoughtsAnswer, self._counts)

    def in_words(self) -> str:
        """What was asked, for the user."""
        counts, model = self._counts, self._asker.endpoint.model
        tokens = counts["prompt_tokens"] + counts["completion_tokens"]
        known = counts["cache_hits"]
        return f"plans by {model}: {counts['calls']} calls, {known} from the cache, {tokens} tokens"


def _shown(episode: Episode, steps: Sequence[Step], move: Move) -> dict[str, JsonValue]:
    """What the model is shown: the tools, what was said so far, and the turn."""
    before: list[JsonValue] = []
    for step in steps:
        before += [_turn(Move(step.plan, step.check, step.call, step.answer)), {"then": step.observation}]
    return {
        "tools": list(episode.tools),
        "messages": list(episode.messages),
        "turns before": before,
        "the turn": _turn(move),
    }


def _turn(move: Move) -> dict[str, JsonValue]:
    call: JsonValue = None
    if move.call is not None:
        call = {"name": move.call.name, "arguments": move.call.arguments}
    found: dict[str, JsonValue] = {
        "plan": move.plan,
        "check": move.check,
        "call": call,
        "answer": move.answer,
    }
    return {name: value for name, value in found.items() if value is not None}


def _without_tags(text: str) -> str:
    for tag in TAGS:
        text = text.replace(tag, "")
    return text.strip()
