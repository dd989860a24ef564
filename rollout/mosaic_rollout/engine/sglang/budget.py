"""A budget of tokens in flight, first come first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TokenBudget:
    """Bounds what is asked of a server at once: prompt tokens it has to compute, and tokens to sample.

    A request larger than the whole budget runs alone. Belongs to one event loop.
    """

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.tokens, self.used, self.peak = tokens, 0, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, tokens: int) -> AsyncIterator[None]:
        """Take `tokens` of the budget, waiting for them behind those who came before."""
        cost = min(tokens, self.tokens)
        if self._waiting or self.used + cost > self.tokens:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((cost, turn))
            try:
                await turn
            except asyncio.CancelledError:
                granted = turn.done() and not turn.cancelled()
                self._give_back(cost if granted else 0)  # its place, too, goes to those behind it
                raise
        else:
            self._take(cost)
        try:
            yield
        finally:
            self._give_back(cost)

    def _take(self, cost: int) -> None:
        self.used += cost
        self.peak = max(self.peak, self.used)

    def _give_back(self, cost: int) -> None:
        self.used -= cost
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.done() and self.used + wanted > self.tokens:
                break
            self._waiting.popleft()
            if not turn.done():
                self._take(wanted)
                turn.set_result(None)
