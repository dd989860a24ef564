"""Questions to a judge's endpoint: from the cache where they were asked before, within limits of cost."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import httpx
from pydantic import BaseModel

from mosaic_fast.errors import TrainingError
from mosaic_fast.judge.answer import read_answer, read_text
from mosaic_fast.judge.cache import AnswerCache, answer_key
from mosaic_fast.judge.client import Endpoint, Reply, fits

Answer = TypeVar("Answer")
Shape = TypeVar("Shape", bound=BaseModel)


class Asker:
    """One endpoint, one cache, and how many calls and tokens it may cost; 0: no limit."""

    def __init__(
        self, endpoint: Endpoint, cache: AnswerCache, *, max_calls: int = 0, max_tokens_total: int = 0
    ) -> None:
        self.endpoint, self._cache = endpoint, cache
        self._max_calls, self._max_tokens_total = max_calls, max_tokens_total
        self._calls = self._tokens = 0  # since the program was started

    async def ask(
        self,
        http: httpx.AsyncClient,
        messages: Sequence[dict[str, str]],
        shape: type[Shape],
        counts: Counter[str],
    ) -> Shape:
        """A JSON answer. `counts` gets calls, cache_hits, retries, prompt_tokens, completion_tokens.

        TrainingError where the endpoint gives none, or a limit is reached.
        """
        key = self._key(messages)
        known = self._cache.get(key)
        if known is not None:
            with contextlib.suppress(ValueError):  # of a damaged cache: asked again
                answer = read_answer(known, shape, quotable=messages[-1]["content"])
                counts["cache_hits"] += 1
                return answer
        return self._keep(messages, await self.endpoint.ask(http, messages, shape, self._allow), counts)

    async def ask_text(
        self,
        http: httpx.AsyncClient,
        messages: Sequence[dict[str, str]],
        pattern: str,
        counts: Counter[str],
    ) -> str:
        """An answer in plain text that matches `pattern` as a whole, any case; else as `ask`."""
        key = self._key(messages)
        known = self._cache.get(key)
        if known is not None:
            with contextlib.suppress(ValueError):
                answer = read_text(known)
                if fits(pattern, answer):
                    counts["cache_hits"] += 1
                    return answer
        reply = await self.endpoint.ask_text(http, messages, pattern, self._allow)
        return self._keep(messages, reply, counts)

    async def probe(
        self, http: httpx.AsyncClient, messages: Sequence[dict[str, str]], wanted: type[BaseModel] | str
    ) -> None:
        """A question whose answer is not kept, before anything else is done; `wanted`: its shape or pattern.

        TrainingError where no valid answer comes.
        """
        endpoint = replace(self.endpoint, after_failure="Nothing else was done yet", after_limit="")
        if isinstance(wanted, str):
            reply = await endpoint.ask_text(http, messages, wanted, self._allow)
        else:
            reply = await endpoint.ask(http, messages, wanted, self._allow)
        self._tokens += reply.prompt_tokens + reply.completion_tokens

    def _key(self, messages: Sequence[dict[str, str]]) -> str:
        endpoint = self.endpoint
        asked = (f"{endpoint.temperature:g}", str(endpoint.max_tokens), *endpoint.parameters.changes)
        settings = " ".join(asked)
        return answer_key(endpoint.model, settings, *(message["content"] for message in messages))

    def _keep(self, messages: Sequence[dict[str, str]], reply: Reply[Answer], counts: Counter[str]) -> Answer:
        self._tokens += reply.prompt_tokens + reply.completion_tokens
        counts["calls"] += reply.tries
        counts["retries"] += reply.tries - 1
        counts["prompt_tokens"] += reply.prompt_tokens
        counts["completion_tokens"] += reply.completion_tokens
        self._cache.put(self._key(messages), reply.text)  # the server may have refused a parameter meanwhile
        return reply.answer

    def _allow(self) -> None:
        """Count a call, or refuse it: the limits are what a mistake can cost at most."""
        calls, tokens = map(self.endpoint.option, ("max_calls", "max_total_tokens"))
        if self._max_calls and self._calls >= self._max_calls:
            raise TrainingError(f"{calls} = {self._max_calls} calls were made{self.endpoint.after_limit}")
        if self._max_tokens_total and self._tokens >= self._max_tokens_total:
            raise TrainingError(
                f"{tokens} = {self._max_tokens_total} tokens were used{self.endpoint.after_limit}"
            )
        self._calls += 1
