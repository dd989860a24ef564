"""States of recurrent layers: kept where a turn ends or a path forks, computed again elsewhere."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.types import Completion, Request
from tests.families.families import VOCAB, config_of, model_of, wholly_fp64
from tests.rollout.engine.helpers import generate, request, stock_logprobs


def tokens_of(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length)


def engine_of(max_cached_tokens: int = 65_536) -> LocalEngine:
    model = model_of(config_of("qwen3_5_text"))
    return LocalEngine(model, prefill_chunk_tokens=8, max_cached_tokens=max_cached_tokens)


def checked(engine: LocalEngine, asked: list[Request]) -> list[Completion]:
    """Completions, whose log-probs are the model's own."""
    completions = generate(engine, asked)
    model = engine._model.model.eval()
    for one, completion in zip(asked, completions, strict=True):
        expected = stock_logprobs(model, one, completion)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-6)
    model.train()
    return completions


def check(engine: LocalEngine, prompt: np.ndarray, key: int) -> tuple[int, np.ndarray]:
    """Cached tokens of a checked completion, and the sequence after it."""
    [completion] = checked(engine, [request(prompt, 5, key=key)])
    return completion.cached_tokens, np.append(prompt, completion.token_ids)


def test_rows_that_leave_before_others_take_only_their_own_states_along() -> None:
    engine = engine_of()
    with wholly_fp64():
        lengths = (2, 9, 5, 1, 7)
        checked(engine, [request(tokens_of(4, n), n, key=n) for n in lengths])
        checked(engine, [request(tokens_of(4, n), 3, key=n + 10) for n in lengths])


def test_a_conversation_goes_on_from_the_states_of_its_last_turn() -> None:
    engine = engine_of()
    with wholly_fp64():
        sequence, known = tokens_of(9, 0), 0
        for turn in range(3):
            cached, sequence = check(engine, sequence, turn)
            assert cached == known
            known = len(sequence) - 1  # the last token was never fed
            sequence = np.append(sequence, tokens_of(3, turn))
        forks = [check(engine, np.append(sequence[:known], [turn]), turn)[0] for turn in range(2)]
    assert forks == [known, known]


def test_a_fork_where_no_states_are_is_computed_from_the_last_ones_before_it() -> None:
    engine = engine_of()
    with wholly_fp64():
        _, sequence = check(engine, tokens_of(9, 0), 0)  # states behind 8 and behind 13 tokens
        inside = np.append(sequence[:11], tokens_of(2, 1))
        assert check(engine, inside, 1)[0] == 8
        assert check(engine, inside, 2)[0] == len(inside) - 1
        early = np.append(sequence[:4], tokens_of(2, 2))
        assert check(engine, early, 3)[0] == 0
        assert check(engine, np.append(sequence[:4], tokens_of(2, 3)), 4)[0] == 4  # a fork keeps them, too


@pytest.mark.parametrize("max_cached_tokens", [1, 60])
def test_states_are_evicted_with_their_nodes(max_cached_tokens: int) -> None:
    engine = engine_of(max_cached_tokens=max_cached_tokens)
    pool = engine._scheduler.tree.pool
    assert pool.shape.state_tokens > 1
    with wholly_fp64():
        for key in range(6):
            check(engine, tokens_of(7 + key, key), key)
            assert pool.filled <= max_cached_tokens
            stateful = sum(node.states is not None for node in engine._scheduler.tree.nodes())
            assert pool.kept_states == stateful
    asyncio.run(engine.flush())
    assert (pool.filled, pool.kept_states) == (0, 0)


def test_half_precision_keeps_states_in_single() -> None:
    engine = LocalEngine(model_of(config_of("qwen3_5_text"), torch.bfloat16))
    inputs, state = engine._model.shape.states[0]
    assert (inputs.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    generate(engine, [request(tokens_of(9, 0), 5)])
