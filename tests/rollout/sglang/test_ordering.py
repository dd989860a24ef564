"""Ordering and budget without a server: who waits for whom."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from mosaic_rollout.engine.sglang.ledger import BLOCK, Flight, PrefixLedger, TokenBudget


def tokens(count: int, *, shared: int = 0, key: int = 0) -> np.ndarray:
    """[count] int64 whose first `shared` are the same for every key."""
    own = np.random.default_rng(key + 1).integers(0, 1000, count)
    own[:shared] = np.arange(shared)
    return own


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def waiting(tasks: list[asyncio.Task[Flight]]) -> list[bool]:
    return [not task.done() for task in tasks]


def test_the_first_of_alike_prompts_goes_ahead_and_the_others_follow_together():
    async def play() -> None:
        ledger = PrefixLedger()
        tasks = [asyncio.create_task(ledger.admit(tokens(50, shared=50))) for _ in range(4)]
        await settle()
        assert waiting(tasks) == [False, True, True, True]
        assert tasks[0].result().new_tokens == 50
        tasks[0].result().prefilled()
        await settle()
        assert waiting(tasks) == [False] * 4
        assert {task.result().new_tokens for task in tasks[1:]} == {1}

    asyncio.run(play())


def test_groups_wait_for_the_common_prefix_only():
    """Two groups of two: a leader for all computes the common part, then each group has its own."""

    async def play() -> None:
        ledger = PrefixLedger()
        prompts = [tokens(96, shared=64, key=group) for group in (0, 0, 1, 1)]
        tasks = [asyncio.create_task(ledger.admit(prompt)) for prompt in prompts]
        await settle()
        assert waiting(tasks) == [False, True, True, True]
        tasks[0].result().prefilled()
        await settle()
        assert waiting(tasks) == [False, False, False, True]
        assert tasks[2].result().new_tokens == 96 - 64
        tasks[2].result().prefilled()
        await settle()
        assert waiting(tasks) == [False] * 4

    asyncio.run(play())


def test_prompts_with_nothing_in_common_do_not_wait():
    async def play() -> None:
        ledger = PrefixLedger()
        for key in range(5):
            await asyncio.wait_for(ledger.admit(tokens(40, shared=BLOCK - 1, key=key)), 1.0)

    asyncio.run(play())


def test_a_failed_leader_is_replaced_by_the_next():
    async def play() -> None:
        ledger = PrefixLedger()
        tasks = [asyncio.create_task(ledger.admit(tokens(50, shared=50))) for _ in range(3)]
        await settle()
        tasks[0].result().failed()
        await settle()
        assert waiting(tasks) == [False, False, True]
        assert tasks[1].result().new_tokens == 50

    asyncio.run(play())


def test_after_a_flush_nothing_counts_as_cached():
    async def play() -> None:
        ledger = PrefixLedger()
        ledger.note(tokens(50, shared=50))
        assert (await ledger.admit(tokens(50, shared=50))).new_tokens == 1
        ledger.clear()
        assert (await ledger.admit(tokens(50, shared=50))).new_tokens == 50

    asyncio.run(play())


@pytest.mark.parametrize("length", [1, 2, BLOCK, BLOCK + 1, BLOCK + 2])
def test_short_prompts_are_admitted_and_wait_where_they_share(length: int):
    async def play() -> None:
        ledger = PrefixLedger()
        tasks = [asyncio.create_task(ledger.admit(tokens(length, shared=length))) for _ in range(2)]
        await settle()
        assert waiting(tasks) == [False, length > 1]  # one token has no prefix to share

    asyncio.run(play())


def test_the_budget_is_kept_first_come_first_served():
    async def play() -> None:
        budget, order, release = TokenBudget(10), [], asyncio.Event()

        async def take(name: int, cost: int) -> None:
            async with budget.hold(cost):
                order.append(name)
                await release.wait()

        jobs = [asyncio.create_task(take(n, c)) for n, c in enumerate([6, 6, 3, 100])]
        await settle()
        assert order == [0]  # the third would fit, but the second came before it
        assert budget.used == 6
        release.set()
        await asyncio.wait_for(asyncio.gather(*jobs), 1.0)
        assert order == [0, 1, 2, 3]  # what exceeds the whole budget runs alone
        assert budget.used == 0
        assert budget.peak <= 10

    asyncio.run(play())


def test_a_cancelled_wait_gives_its_place_away():
    async def play() -> None:
        budget, release = TokenBudget(4), asyncio.Event()

        async def take(cost: int) -> None:
            async with budget.hold(cost):
                await release.wait()

        holder, cancelled, third = (asyncio.create_task(take(cost)) for cost in (3, 4, 1))
        await settle()
        cancelled.cancel()
        await settle()
        assert budget.used == 4  # the third no longer waits behind it
        release.set()
        await asyncio.wait_for(asyncio.gather(holder, third), 1.0)
        assert budget.used == 0

    asyncio.run(play())


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        TokenBudget(0)
