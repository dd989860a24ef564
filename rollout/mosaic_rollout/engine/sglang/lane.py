"""One server and everything that is under way to it: ordering, budget, watching, starting again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from mosaic_rollout.engine.sglang.client import Sample, ServerUnavailableError, SGLangClient
from mosaic_rollout.engine.sglang.ledger import Flight, PrefixLedger, ServingStats, TokenBudget
from mosaic_rollout.engine.sglang.server import ServerProcess
from mosaic_rollout.engine.stats import EngineError
from mosaic_rollout.types import Request

_log = logging.getLogger(__name__)

FAILURES = 3
"""Failures in a row, of one request or of one server, after which the engine gives up."""

_PROBE_EVERY_S = 2.0
_CAPACITY = 65_536  # tokens, of a server that does not say
_AGAIN_S = 2.0  # between looks at a server of somebody else's that does not answer


@dataclass(frozen=True)
class LaneOptions:
    """Deadlines, in seconds, and the budget of tokens in flight (0: what the server's cache holds)."""

    request_timeout_s: float
    hang_timeout_s: float
    startup_timeout_s: float
    max_inflight_tokens: int


class Lane:
    """A server, launched by us (`process`) or somebody else's (`url`), as one event loop sees it.

    `restore` brings a server that has come back to the weights it should serve. `asleep` says whether it has
    given memory back, and cannot generate.
    """

    def __init__(
        self,
        *,
        process: ServerProcess | None,
        url: str,
        options: LaneOptions,
        stats: ServingStats,
        restore: Callable[[Lane], Awaitable[None]],
        asleep: Callable[[Lane], bool] = lambda lane: False,
    ) -> None:
        self.process, self._url, self.options, self._stats = process, url, options, stats
        self._restore, self._asleep = restore, asleep
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: SGLangClient | None = None
        self._failures = 0  # in a row
        self._capacity = 0  # tokens, 0 until measured
        self._life = 0  # counts restarts, so that one failure seen by many requests is mended once
        self._in_flight = 0

    @property
    def url(self) -> str:
        return self.process.url if self.process else self._url

    @property
    def client(self) -> SGLangClient:
        """The connection of the running event loop."""
        self._enter_loop()
        if self._client is None or self._client.url != self.url:
            self._client = SGLangClient(self.url)
        return self._client

    @property
    def ledger(self) -> PrefixLedger:
        self._enter_loop()
        return self._ledger

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        client, self._client, loop, self._loop = self._client, None, self._loop, None
        if client is not None and loop is asyncio.get_running_loop():
            await client.aclose()

    async def generate(self, request: Request, seed: int | None) -> Sample:
        """Sample, over restarts of the server if need be; EngineError after FAILURES failures."""
        self._enter_loop()
        asked = time.perf_counter()
        for attempt in range(1, FAILURES + 1):
            flight = await self._ledger.admit(request.token_ids)
            life = self._life
            try:
                async with self._budget.hold(flight.new_tokens + request.sampling.max_new_tokens):
                    async with self._mending:  # not to a server that is known to be down
                        life = self._life
                    waited_s = time.perf_counter() - asked
                    sample = await self._send(request, seed, flight)
            except ServerUnavailableError as error:
                flight.failed()
                if attempt == FAILURES:
                    raise EngineError(
                        f"a request failed {FAILURES} times in a row, at last: {error}"
                    ) from error
                self._stats.resent += 1
                await self._mend(life, error)
                continue
            finally:
                flight.failed()  # nothing after `prefilled`
            self.succeeded()
            self._stats.add(sample, waited_s)
            self._ledger.note(np.concatenate([request.token_ids, sample.token_ids]))
            return sample
        raise AssertionError("unreachable")

    async def _send(self, request: Request, seed: int | None, flight: Flight) -> Sample:
        async with self._watched():
            return await self.client.generate(
                request,
                seed=seed,
                timeout_s=self.options.request_timeout_s,
                on_prefilled=flight.prefilled,
            )

    def succeeded(self) -> None:
        """Failures from now on are a row of their own."""
        self._failures = 0

    async def mend(self, error: ServerUnavailableError) -> None:
        """Bring the server back after an error outside `generate`. EngineError after FAILURES attempts."""
        self._enter_loop()
        await self._mend(self._life, error)

    async def _mend(self, life: int, error: EngineError) -> None:
        """Bring the server back, unless somebody has since `life`. EngineError after FAILURES attempts."""
        async with self._mending:
            last: EngineError = error
            while self._life == life:
                self._failures += 1
                if self._failures >= FAILURES:
                    log = f"; its log is {self.process.log_path}" if self.process else ""
                    raise EngineError(
                        f"the SGLang server failed {FAILURES} times in a row{log}. At last: {last}"
                    )
                _log.warning("%s: %s. Bringing it back", self.url, last)
                try:
                    await self._bring_back()
                except EngineError as failed:
                    last = failed
                    continue
                self._life += 1

    async def _bring_back(self) -> None:
        if await self._answers():
            return  # a connection or a request was lost, not the server
        if self.process is not None:
            self._stats.restarts += 1
            self.process.kill()
            client, self._client = self._client, None
            if client is not None:
                await client.aclose()
        else:
            await self._wait_for_other()
        await self._restore(self)
        self._ledger.clear()

    async def _answers(self) -> bool:
        """Whether a server of ours is still there and generates; another's may have lost its weights."""
        if self.process is None or self.process.pid is None or self.process.exit_code is not None:
            return False
        try:
            await self.client.call(self._health, timeout_s=self.options.hang_timeout_s)
        except EngineError:
            return False
        return True

    @property
    def _health(self) -> str:
        """What a living server answers: a token; without its memory, what its scheduler knows of itself."""
        return "/server_info" if self._asleep(self) else "/health_generate"

    async def _wait_for_other(self) -> None:
        """Until a server that is not ours answers again; ServerUnavailableError at the deadline."""
        deadline = asyncio.get_running_loop().time() + self.options.startup_timeout_s
        while True:
            try:
                await self.client.call(self._health, timeout_s=self.options.hang_timeout_s)
                return
            except ServerUnavailableError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(_AGAIN_S)

    @contextlib.asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        """Have the server watched while something is in flight."""
        self._in_flight += 1
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch(), name=f"watch {self.url}")
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._watcher.cancel()

    async def _watch(self) -> None:
        """Kill a server of ours that hangs: its requests fail at once, and are sent again.

        A server is hung when it makes no token of anybody's, nor a probe's, for hang_timeout_s. Another's
        server is left alone; the requests' own deadlines hold.
        """
        if self.process is None:
            return
        life = self._life
        while True:
            await asyncio.sleep(_PROBE_EVERY_S)
            try:
                # the server answers 503 at its own deadline, the same; a stopped one answers nothing
                await self.client.call("/health_generate", timeout_s=self.options.hang_timeout_s + 3.0)
            except EngineError:
                if self._life == life and not self._mending.locked():
                    self.process.kill()
                return

    async def measure(self) -> None:
        """Ask the server once how many tokens its cache holds: the budget, where none is given."""
        if not self._capacity:
            info = await self.client.call("/server_info", timeout_s=self.options.hang_timeout_s)
            found = info.get("max_total_num_tokens")
            self._capacity = found if isinstance(found, int) and found > 0 else _CAPACITY
            self._budget = self._new_budget()

    def _new_budget(self) -> TokenBudget:
        return TokenBudget(self.options.max_inflight_tokens or self._capacity or _CAPACITY)

    def _enter_loop(self) -> None:
        """State that belongs to an event loop is made anew in each."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        self._loop, self._client = loop, None
        self._ledger = PrefixLedger()
        self._budget = self._new_budget()
        self._mending = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._in_flight = 0
