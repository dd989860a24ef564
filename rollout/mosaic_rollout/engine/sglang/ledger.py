"""A budget of tokens in flight, first come first served.

Which prefixes a server's cache holds, and which it is computing: so that siblings meet a warm one.

SGLang shares a prefix between two requests only if it was computed when the second one is scheduled; cold
siblings sent together each compute all of it. Here a request waits as long as another is computing a prefix
of it that is not in the cache yet. The first of a group goes ahead, and when its first token arrives the
others follow, whatever the shape of the sharing: prompts alike, a system prompt in common, a fork.

Prefixes are known by chained hashes of blocks of tokens. They order requests and decide nothing else: a
prefix the server has evicted meanwhile is computed again, as if there were no ledger.

What the servers did since the last reset, as sums that add up over steps.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields

import numpy as np

from mosaic_rollout.engine.sglang.client import Sample
from mosaic_rollout.engine.stats import LAST


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


BLOCK = 8  # tokens; siblings compute up to this many tokens of a shared prefix again


class Flight:
    """A request on its way and the blocks it is the first to compute. End it with `prefilled` or `failed`."""

    def __init__(self, ledger: PrefixLedger, blocks: list[int], new_tokens: int) -> None:
        self._ledger, self._blocks = ledger, blocks
        self.new_tokens = new_tokens  # of the prompt, those the server will compute
        self.event = asyncio.Event()

    def prefilled(self) -> None:
        """Its prompt is in the cache: whoever waits for it may go."""
        if not self.event.is_set():
            for block in self._blocks:
                if self._ledger.pending.get(block) is self:
                    del self._ledger.pending[block]
                    self._ledger.ready.add(block)
            self.event.set()

    def failed(self) -> None:
        """It will compute nothing: whoever waits may try; the first of them goes ahead."""
        if not self.event.is_set():
            for block in self._blocks:
                if self._ledger.pending.get(block) is self:
                    del self._ledger.pending[block]
            self.event.set()


class PrefixLedger:
    """The ledger of one server since its cache was last emptied. Belongs to one event loop."""

    def __init__(self) -> None:
        self.ready: set[int] = set()
        self.pending: dict[int, Flight] = {}

    def clear(self) -> None:
        """The cache was emptied."""
        self.ready.clear()

    async def admit(self, token_ids: np.ndarray) -> Flight:
        """Wait until nothing in flight computes a prefix of the prompt [L] int64; then it is this one's."""
        blocks = _chain(token_ids)
        while (other := self._computing(blocks)) is not None:
            await other.event.wait()
        known = 0
        while known < len(blocks) and blocks[known] in self.ready:
            known += 1
        flight = Flight(self, blocks[known:], max(1, len(token_ids) - known * BLOCK))
        self.pending.update(dict.fromkeys(blocks[known:], flight))
        return flight

    def note(self, token_ids: np.ndarray) -> None:
        """A finished sequence [L] is in the cache."""
        self.ready.update(_chain(token_ids))

    def _computing(self, blocks: list[int]) -> Flight | None:
        """The flight that computes the first block not ready; None where no flight does."""
        for block in blocks:
            if block not in self.ready:
                return self.pending.get(block)
        return None


def _chain(token_ids: np.ndarray) -> list[int]:
    """Hash of each prefix that ends at a block's end, and of the whole, the last token aside.

    The last token is always computed, cached or not, since it gives the first logits.
    """
    raw = np.ascontiguousarray(token_ids[:-1], np.int64).tobytes()
    hashes: list[int] = []
    above = 0
    for start in range(0, len(raw), 8 * BLOCK):
        above = hash((above, raw[start : start + 8 * BLOCK]))
        hashes.append(above)
    return hashes


@dataclass
class ServingStats:
    """Sums over finished requests; of a request that was sent again, only the answer that counted."""

    completions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # as the server counts: of the prompt, found in its radix cache
    generated_tokens: int = 0
    resent: int = 0  # requests sent again after a server failed them
    restarts: int = 0
    first_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))
    """Of the last LAST requests, from asking to the first token."""

    def add(self, sample: Sample, waited_s: float) -> None:
        """waited_s: what passed between asking for it and sending it."""
        self.completions += 1
        self.prompt_tokens += sample.prompt_tokens
        self.cached_tokens += sample.cached_tokens
        self.generated_tokens += len(sample.token_ids)
        self.first_token_s.append(waited_s + sample.first_token_s)

    def reset(self) -> None:
        self.first_token_s.clear()
        for each in fields(self):
            if each.name != "first_token_s":
                setattr(self, each.name, 0)
