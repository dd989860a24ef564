"""What the engine samples and reports is what the stock model gives, whatever is cached or batched."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_rollout.engine import scheduler
from mosaic_rollout.types import Request
from tests.rollout.engine.helpers import (
    BENT_FAMILIES,
    FAMILIES,
    VOCAB,
    generate,
    local_engine,
    logits_of,
    naive_sample,
    random_tokens,
    request,
    shared_model,
    stock_logprobs,
    tiny_model,
)


def forest_requests() -> list[Request]:
    """Prompts that share, nest, repeat and differ in length, at several temperatures."""
    shared = random_tokens(19, 1)
    prompts = [
        np.concatenate([shared, random_tokens(5, 2)]),
        np.concatenate([shared, random_tokens(9, 3)]),
        np.concatenate([shared, random_tokens(9, 3)]),
        shared,
        shared[:11],
        random_tokens(1, 4),
        random_tokens(23, 5),
    ]
    temperatures = (1.0, 0.7, 1.0, 1.6, 0.0, 1.0, 1.0)
    return [
        request(prompt, 6 + 3 * index, key=index, temperature=temperature)
        for index, (prompt, temperature) in enumerate(zip(prompts, temperatures, strict=True))
    ]


# fp64: the engine reports float32, half an ulp below 16 is 5e-7; fp32: the rounding of 3 layers
CASES = [*((family, torch.float64, 5e-7) for family in FAMILIES)]
CASES += [(family, torch.float32, 1e-5) for family in FAMILIES + BENT_FAMILIES]


@pytest.mark.parametrize(("family", "dtype", "tolerance"), CASES, ids=str)
def test_logprobs_equal_the_stock_forward_cold_and_cached(
    family: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = tiny_model(family, dtype)
    engine = local_engine(model, prefill_chunk_tokens=16)  # prompts are cut inside nodes
    requests = forest_requests()
    cold = generate(engine, requests)
    cached = generate(engine, requests)
    assert [c.cached_tokens for c in cached] == [len(r.token_ids) - 1 for r in requests]
    for asked, first, second in zip(requests, cold, cached, strict=True):
        for completion in (first, second):
            stock = stock_logprobs(model, asked, completion)
            np.testing.assert_allclose(completion.logprobs, stock, rtol=0, atol=tolerance)
        if dtype == torch.float64:
            np.testing.assert_array_equal(first.token_ids, second.token_ids)


def test_fp64_logits_agree_to_fp64_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    # log-probs are reported as float32; this looks at the logits before that
    seen: list[torch.Tensor] = []

    def spy(logits: torch.Tensor, *others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append(logits.clone())
        return sample(logits, *others)

    sample = scheduler.sample_tokens
    monkeypatch.setattr(scheduler, "sample_tokens", spy)
    for family in FAMILIES:
        model = tiny_model(family)
        engine = local_engine(model)
        prompts = [np.concatenate([random_tokens(12, 1), random_tokens(n, n)]) for n in (3, 8, 5)]
        for _ in range(2):  # cold, then cached
            seen.clear()
            completions = generate(engine, [request(prompt, 6, key=i) for i, prompt in enumerate(prompts)])
            for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
                sequence = np.concatenate([prompt, completion.token_ids])
                stock = logits_of(model, sequence)[len(prompt) - 1 : -1]
                ours = torch.stack([logits[row] for logits in seen])
                assert (ours - stock).norm() / stock.norm() < 1e-12, family


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_random_request_trees_match_a_sampler_without_cache(data: st.DataObject) -> None:
    model = shared_model()
    engine = local_engine(
        model,
        max_batch=data.draw(st.integers(1, 6), "max_batch"),
        max_cached_tokens=data.draw(st.sampled_from([1, 7, 30, 1000]), "max_cached_tokens"),
        prefill_chunk_tokens=data.draw(st.sampled_from([1, 3, 8, 64]), "chunk"),
    )
    tokens = st.lists(st.integers(0, 3), min_size=1, max_size=9)
    prompts = data.draw(st.lists(tokens, min_size=1, max_size=6), "prompts")
    for turn in range(data.draw(st.integers(1, 3), "turns")):
        requests = [
            request(
                prompt,
                data.draw(st.integers(1, 5)),
                key=data.draw(st.integers(0, 2)),
                seed=turn,
                temperature=data.draw(st.sampled_from([0.0, 0.8, 1.0])),
                stop=data.draw(st.sampled_from([(), (1, 2, 3)])),
            )
            for prompt in prompts
        ]
        completions = generate(engine, requests)
        assert [c.token_ids.tolist() for c in completions] == [naive_sample(model, r) for r in requests]
        observation = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4), "observation")
        prompts = [
            [*prompt, *completion.token_ids.tolist(), *observation]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def test_batch_composition_does_not_change_tokens() -> None:
    model = tiny_model()
    requests = forest_requests()
    together = generate(local_engine(model), requests)
    two_at_a_time = generate(local_engine(model, max_batch=2), requests[::-1])[::-1]
    for asked, one, other in zip(requests, together, two_at_a_time, strict=True):
        [alone] = generate(local_engine(model), [asked])
        np.testing.assert_array_equal(one.token_ids, alone.token_ids)
        np.testing.assert_array_equal(one.token_ids, other.token_ids)


def test_the_same_calls_give_the_same_bits() -> None:
    model = tiny_model(dtype=torch.float32)
    runs = []
    for _ in range(2):
        engine = local_engine(model, max_batch=3, max_cached_tokens=60)
        runs.append([generate(engine, forest_requests()) for _ in range(2)])
    for first, second in zip(*map(chain.from_iterable, runs), strict=True):
        assert first.token_ids.tobytes() == second.token_ids.tobytes()
        assert first.logprobs.tobytes() == second.logprobs.tobytes()
        assert first.cached_tokens == second.cached_tokens


def test_siblings_with_different_keys_differ_and_with_one_key_agree() -> None:
    engine = local_engine(tiny_model())
    prompt = random_tokens(5, 0)
    same, again, other, reseeded = generate(
        engine,
        [
            request(prompt, 12, key=1),
            request(prompt, 12, key=1),
            request(prompt, 12, key=2),
            request(prompt, 12, key=1, seed=1),
        ],
    )
    np.testing.assert_array_equal(same.token_ids, again.token_ids)
    assert not np.array_equal(same.token_ids, other.token_ids)
    assert not np.array_equal(same.token_ids, reseeded.token_ids)
