"""Questions to a judge's endpoint: from the cache where they were asked before, within limits of cost.

Answers of an LLM judge on disk: each is kept the moment it arrives, so a killed run asks nothing twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import BaseModel

from mosaic_fast.errors import TrainingError, UserError
from mosaic_fast.preferences.answer import read_answer, read_text
from mosaic_fast.preferences.endpoint import Endpoint, Reply, fits

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


class AnswerCache:
    """A SQLite file, key -> answer, opened at first use. Several runs may share one.

    UserError where the file is no such thing or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    def get(self, key: str) -> str | None:
        with self._named_errors():
            row = self._open().execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, answer: str) -> None:
        """Kept for good when this returns: each answer is a transaction of its own."""
        with self._named_errors():
            self._open().execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self._path, timeout=60.0, isolation_level=None)
            database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
            self._database = database
        return self._database

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"judge.cache: {self._path} cannot be used: {error}. Free some space, or name another file"
            ) from None


def answer_key(*parts: str) -> str:
    """The key of a question: a hash of all that decides its answer."""
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()
