"""Tool calls with a time limit: a tool that hangs becomes an observation, not a run that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from mosaic_rollout.types import Episode, Observation, ToolCall

_STRAY = (StopIteration, GeneratorExit, SystemExit, asyncio.CancelledError)
"""What a future cannot hold, or what would end the task that waits for it, or the process."""


class ToolRunner:
    """Runs the calls of one episode, one after the other.

    timeout_s 0: in place, without a limit; the order of calls between rollouts is then a function of the
    run alone, which bitwise repeatable runs need. Above 0: each call in a thread of its own. Python cannot
    stop a thread, so a call that overran goes on; until it ends, later calls are answered with an error
    observation in its place, lest two calls change one episode at a time, and `settle` waits for it.
    """

    def __init__(self, episode: Episode, timeout_s: float) -> None:
        self._episode, self._timeout_s = episode, timeout_s
        self._running: asyncio.Future[Observation] | None = None

    async def run(self, call: ToolCall) -> Observation:
        """Carry out a call; at the limit an error observation that says so."""
        if not self._timeout_s:
            return self._episode.step(call)
        if self._running is None or self._running.done():
            self._running = self._start(call)
            done, _ = await asyncio.wait({self._running}, timeout=self._timeout_s)
            if done:
                return self._running.result()
            return Observation(
                f"Error: {call.name} did not finish within {self._timeout_s:g} seconds", is_error=True
            )
        return Observation(f"Error: {call.name} was not run, an earlier call is still running", is_error=True)

    async def settle(self) -> bool:
        """Wait for a call that overran, for as long again as any call may take. False where it goes on."""
        if self._running is None or self._running.done():
            return True
        done, _ = await asyncio.wait({self._running}, timeout=self._timeout_s)
        return bool(done)

    def _start(self, call: ToolCall) -> asyncio.Future[Observation]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Observation] = loop.create_future()

        def deliver(result: Observation | BaseException) -> None:
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

        def work() -> None:
            try:
                result: Observation | BaseException = self._episode.step(call)
            except _STRAY as error:
                result = RuntimeError(f"{call.name} raised {type(error).__name__}: {error}")
            except BaseException as error:  # noqa: BLE001  raised again where the call is awaited
                result = error
            with contextlib.suppress(RuntimeError):  # closed: the run has ended without waiting for this call
                loop.call_soon_threadsafe(deliver, result)

        threading.Thread(target=work, daemon=True, name=f"tool {call.name}").start()
        return future
