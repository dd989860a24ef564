"""An engine for the agent loop that does what a script says in a model's own words.

A model too small to solve a benchmark's tasks answers, or rambles, in its first turn: its trajectories have
one. Here each turn's action is given, and a model samples what leads to it: the plan, and the check where
the script has one. Siblings with one script so differ as a policy's rollouts do, from some sampled token on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.grammar import SAFETY_CLOSE, SAFETY_OPEN, THINK_CLOSE, THINK_OPEN
from mosaic_rollout.types import Completion, Engine, Request

_NEXT_TURN = "<|im_start|>assistant"  # ChatML, as SmolLM2's and Qwen's templates write it
_MOST_TOKENS = 48  # sampled for a plan, and for a check


@dataclass(frozen=True)
class ScriptedTurn:
    """One turn: an action as the policy would write it, and whether a check goes before it."""

    action: str
    checked: bool = False


class GuidedEngine:
    """Serves turns of `scripts[rollout_key]`, the last one again where a rollout has had them all.

    sampler: the model's engine. prompt_tokens: length of the prompt, which all rollouts share.
    A plan or check ends with its first line, before a tag, or after 48 tokens. What is given and not sampled
    has log-prob 0, since it was certain.
    """

    def __init__(
        self, sampler: Engine, chat: Chat, prompt_tokens: int, scripts: Sequence[Sequence[ScriptedTurn]]
    ) -> None:
        self._sampler, self._chat = sampler, chat
        self._prompt_tokens, self._scripts = prompt_tokens, scripts

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return list(await asyncio.gather(*(self._complete(request) for request in requests)))

    async def update_weights(self, version: int) -> None:
        await self._sampler.update_weights(version)

    async def flush(self) -> None:
        await self._sampler.flush()

    async def _complete(self, request: Request) -> Completion:
        turns = self._chat.decode(request.token_ids[self._prompt_tokens :]).split(_NEXT_TURN)
        script, begun = self._scripts[request.rollout_key], turns[-1]
        turn = script[min(len(turns), len(script)) - 1]
        writing = _Writing(self._sampler, self._chat, request)
        if THINK_CLOSE not in begun:  # else a fork after its parent's plan
            await writing.sample_between(THINK_OPEN, THINK_CLOSE)
        if turn.checked:
            await writing.sample_between(f"\n{SAFETY_OPEN}", SAFETY_CLOSE)
        writing.give(f"\n{turn.action}")
        return writing.completion()


class _Writing:
    """One completion while it is being written."""

    def __init__(self, sampler: Engine, chat: Chat, request: Request) -> None:
        self._sampler, self._chat, self._request = sampler, chat, request
        self._ids = np.zeros(0, np.int64)
        self._logprobs = np.zeros(0, np.float32)

    async def sample_between(self, opens: str, closes: str) -> None:
        """Write the opening tag, one line that the model samples, and the closing tag."""
        self.give(opens)
        request = replace(
            self._request,
            token_ids=np.concatenate([self._request.token_ids, self._ids]),
            sampling=replace(self._request.sampling, max_new_tokens=_MOST_TOKENS),
        )
        (found,) = await self._sampler.generate([request])
        count = self._line(found.token_ids)
        self._append(found.token_ids[:count], found.logprobs[:count])
        self.give(closes)

    def give(self, text: str) -> None:
        ids = np.asarray(self._chat.tokenizer.encode(text, add_special_tokens=False), np.int64)
        self._append(ids, np.zeros(len(ids), np.float32))

    def completion(self) -> Completion:
        """The finished turn as a completion, cut where it is longer than the request allows."""
        stop = self._request.sampling.stop_token_ids[:1]
        self._append(np.asarray(stop, np.int64), np.zeros(1, np.float32))
        most = self._request.sampling.max_new_tokens
        return Completion(
            token_ids=self._ids[:most],
            logprobs=self._logprobs[:most],
            finish_reason="stop" if len(self._ids) <= most else "length",
            cached_tokens=0,
            prompt_tokens=len(self._request.token_ids),
            policy_version=0,
        )

    def _line(self, token_ids: np.ndarray) -> int:
        """How many tokens [N] there are before the first line's end, a tag or the turn's end."""
        begun = False  # blank tokens may come before the line
        for count, token in enumerate(token_ids.tolist()):
            text = self._chat.decode([token])
            if (begun and "\n" in text) or "<" in text or token in self._request.sampling.stop_token_ids:
                return count
            begun = begun or bool(text.strip())
        return len(token_ids)

    def _append(self, ids: np.ndarray, logprobs: np.ndarray) -> None:
        self._ids = np.concatenate([self._ids, ids])
        self._logprobs = np.concatenate([self._logprobs, logprobs])
