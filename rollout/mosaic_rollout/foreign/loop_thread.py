"""Event loops around foreign code: one in a thread to await in, and none where it may start its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

Result = TypeVar("Result")
_STARTING = threading.Lock()


class LoopThread:
    """An event loop that runs in a daemon thread, for as long as the process does."""

    def __init__(self, name: str = "foreign code") -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True, name=name).start()

    def run(self, work: Awaitable[Result]) -> Result:
        """Await there, wait here. Raises what the work raises, also what would end the loop (SystemExit)."""
        result, error = asyncio.run_coroutine_threadsafe(caught(work), self.loop).result()
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # there is one where nothing was raised


def shared_loop() -> LoopThread:
    """The process's event loop for foreign code, started when it is first asked for."""
    with _STARTING:
        return _loop_of(os.getpid())  # a forked process has the object, but not the thread


@cache
def _loop_of(process: int) -> LoopThread:
    return LoopThread()


async def caught(work: Awaitable[Result]) -> tuple[Result | None, BaseException | None]:
    """The result of the work, or what it raised, whatever that is: nothing of it reaches the loop."""
    try:
        return await work, None
    except BaseException as error:  # noqa: BLE001  raised again where the result is waited for
        return None, error


@contextmanager
def no_running_loop() -> Iterator[None]:
    """Within it, this thread runs no event loop as far as asyncio knows: `asyncio.run` may be called.

    The loop that does run here waits meanwhile, as it does for any function that is called.
    """
    loop = asyncio._get_running_loop()
    if loop is None:
        yield
        return
    task = asyncio.current_task(loop)
    if task is not None:
        asyncio.tasks._leave_task(loop, task)
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)
        if task is not None:
            asyncio.tasks._enter_task(loop, task)
