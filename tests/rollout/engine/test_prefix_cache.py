"""What is computed, what is found, and that nothing stale is ever served."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.engine.scheduler import Scheduler
from tests.rollout.engine.helpers import (
    generate,
    local_engine,
    random_tokens,
    request,
    stock_logprobs,
    tiny_model,
    tokens_held,
)


def unique_prefixes(prompts: list[np.ndarray]) -> int:
    return len({tuple(prompt[:n].tolist()) for prompt in prompts for n in range(1, len(prompt) + 1)})


def test_cold_siblings_prefill_once() -> None:
    engine = local_engine(tiny_model())
    system = random_tokens(20, 0)
    tasks = [np.concatenate([system, random_tokens(6, task)]) for task in (1, 2, 3)]
    prompts = [task for task in tasks for _ in range(4)]
    completions = generate(engine, [request(prompt, 3, key=key) for key, prompt in enumerate(prompts)])
    assert engine.stats.computed_prefill_tokens == unique_prefixes([prompt[:-1] for prompt in prompts])
    # the first of each task pays, the first of all pays for the system prompt too
    assert [c.cached_tokens for c in completions] == [0, 25, 25, 25, 20, 25, 25, 25, 20, 25, 25, 25]
    stats = engine.stats
    assert stats.prompt_tokens == stats.cached_tokens + stats.computed_prefill_tokens + stats.completions
    assert (stats.cached_tokens, stats.prompt_tokens) == (9 * 25 + 2 * 20, 12 * 26)


def test_each_step_of_a_conversation_finds_all_before_it() -> None:
    engine = local_engine(tiny_model())
    sequence = random_tokens(9, 0)
    known = 0
    for turn in range(4):
        [completion] = generate(engine, [request(sequence, 5, key=turn)])
        assert completion.cached_tokens == known
        # all but the last sampled token, whose keys and values were never needed
        known = len(sequence) + len(completion.token_ids) - 1
        sequence = np.concatenate([sequence, completion.token_ids, random_tokens(3, turn)])
    forks = generate(engine, [request(sequence[:known], 4, key=key) for key in range(3)])
    assert [fork.cached_tokens for fork in forks] == [known - 1] * 3
    assert (
        engine.stats.computed_prefill_tokens == 8 + 3 * 3
    )  # the prompt, then 1 + 3 new tokens less the last


def change_weights(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))


def worst_error_after_update(engine: LocalEngine, model: PreTrainedModel) -> float:
    """Generate, change the weights in place, update, generate the same again: error of the log-probs."""
    asked = [request(random_tokens(15, 0), 8, key=key) for key in range(3)]
    generate(engine, asked)
    change_weights(model)
    asyncio.run(engine.update_weights(7))
    completions = generate(engine, asked)
    assert {completion.policy_version for completion in completions} == {7}
    stock = [stock_logprobs(model, *pair) for pair in zip(asked, completions, strict=True)]
    return max(float(np.abs(c.logprobs - s).max()) for c, s in zip(completions, stock, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_new_weights_are_served_exactly(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model(dtype=dtype)
    assert worst_error_after_update(local_engine(model), model) < tolerance


def test_without_the_flush_that_test_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    # guards the guard: stale keys must be visible in the log-probs, or the test above shows nothing
    monkeypatch.setattr(Scheduler, "clear_cache", lambda self: None)
    model = tiny_model()
    assert worst_error_after_update(local_engine(model), model) > 1e-3


def test_flush_empties_the_cache_and_changes_no_token() -> None:
    engine = local_engine(tiny_model())
    asked = [request(random_tokens(15, 0), 8)]
    [before] = generate(engine, asked)
    assert tokens_held(engine) == 15 + 8 - 1
    asyncio.run(engine.flush())
    assert tokens_held(engine) == 0
    [after] = generate(engine, asked)
    assert after.cached_tokens == 0
    np.testing.assert_array_equal(before.token_ids, after.token_ids)


def test_update_is_refused_while_requests_are_in_flight_and_flush_is_not() -> None:
    engine = local_engine(tiny_model())
    asked = request(random_tokens(10, 0), 12)
    [alone] = generate(engine, [asked])

    async def interrupted() -> np.ndarray:
        running = asyncio.create_task(engine.generate([asked]))
        for _ in range(4):
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="1 requests in flight"):
            await engine.update_weights(1)
        await engine.flush()
        return (await running)[0].token_ids

    np.testing.assert_array_equal(asyncio.run(interrupted()), alone.token_ids)


@pytest.mark.parametrize("max_cached_tokens", [1, 17, 40])
def test_a_tiny_cache_stays_bounded_and_exact(max_cached_tokens: int) -> None:
    model = tiny_model()
    engine = local_engine(model, max_cached_tokens=max_cached_tokens)
    unbounded = local_engine(model)
    prompts = [np.concatenate([random_tokens(12, 0), random_tokens(5, 1 + key % 4)]) for key in range(8)]
    for _ in range(3):
        asked = [request(prompt, 5, key=key) for key, prompt in enumerate(prompts)]
        bounded = generate(engine, asked)
        assert tokens_held(engine) <= max_cached_tokens
        for one, other in zip(bounded, generate(unbounded, asked), strict=True):
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
        prompts = [
            np.concatenate([p, c.token_ids, random_tokens(2, 9)])
            for p, c in zip(prompts, bounded, strict=True)
        ]
