"""Keyed draws are uniform and independent; tokens follow the model's distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mosaic_rollout.engine.sampling import sample_tokens, stream_base, uniforms


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations of Pearson's statistic above its mean, by Wilson and Hilferty's cube root."""
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2.0 / (9.0 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1.0 - spread)) / spread**0.5


def bases_of(count: int, seed: int = 0) -> np.ndarray:
    return np.array([stream_base(seed, key) for key in range(count)], np.uint64)


@pytest.mark.parametrize("along", ["position", "rollout", "seed"])
def test_uniforms_fill_the_interval_along_each_part_of_the_key(along: str) -> None:
    # neighbouring keys are the usual ones: a weak hash shows here first
    count = 20_000
    positions = np.arange(count) if along == "position" else np.full(count, 3)
    if along == "position":
        bases = np.repeat(bases_of(1), count)
    elif along == "rollout":
        bases = bases_of(count)
    else:
        bases = np.array([stream_base(seed, 5) for seed in range(count)], np.uint64)
    draws = uniforms(bases, positions)
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert abs(chi_square(counts, np.full(100, count / 100))) < 4.0
    pairs = np.histogram2d(draws[:-1], draws[1:], bins=20, range=[[0, 1], [0, 1]])[0].ravel()
    assert abs(chi_square(pairs, np.full(400, (count - 1) / 400))) < 4.0


def test_streams_of_different_rollouts_and_seeds_are_uncorrelated() -> None:
    positions = np.arange(50_000)
    streams = [(0, 0), (0, 1), (1, 0), (1, 1), (2**63, 0), (-1, 7)]
    drawn = [uniforms(np.full(50_000, stream_base(*key), np.uint64), positions) for key in streams]
    correlation = np.corrcoef(drawn) - np.eye(len(streams))
    assert np.abs(correlation).max() < 5 / 50_000**0.5


def test_no_two_keys_share_a_stream() -> None:
    bases = {stream_base(seed, key) for seed in range(100) for key in range(100)}
    assert len(bases) == 100 * 100


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampled_tokens_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    count = 40_000
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 1.5
    draws = uniforms(np.repeat(bases_of(1, seed=1), count), np.arange(count))
    tokens, logprobs = sample_tokens(logits.expand(count, -1), np.full(count, temperature), draws)
    expected = torch.softmax(logits.double() / temperature, dim=-1).numpy()
    assert abs(chi_square(np.bincount(tokens, minlength=30), expected * count)) < 4.0
    np.testing.assert_allclose(logprobs, np.log(expected)[tokens], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_token_of_probability_zero_is_never_drawn(dtype: torch.dtype) -> None:
    # the edges of the interval, and logits so far apart that the probability underflows
    logits = torch.tensor([-torch.inf, -2000.0, 0.0, -torch.inf, 0.0, -2000.0, -torch.inf]).to(dtype)
    draws = np.array([0.0, 0.25, 0.5 - 2**-53, 0.5, 0.75, 1.0 - 2**-52])
    tokens, _ = sample_tokens(logits.expand(len(draws), -1), np.ones(len(draws)), draws)
    np.testing.assert_array_equal(tokens, [2, 2, 2, 4, 4, 4])


def test_greedy_rows_take_the_largest_and_report_temperature_one() -> None:
    logits = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    temperatures = np.array([0.0, 1.0, 0.0, 0.3, 0.0])
    tokens, logprobs = sample_tokens(logits, temperatures, np.full(5, 0.9))
    greedy = temperatures == 0
    np.testing.assert_array_equal(tokens[greedy], logits.argmax(-1).numpy()[greedy])
    stock = torch.log_softmax(logits, -1).max(-1).values.float().numpy()
    np.testing.assert_allclose(logprobs[greedy], stock[greedy], rtol=0, atol=1e-7)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_logits_show_in_the_logprob_of_their_row_only(broken: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = broken
    tokens, logprobs = sample_tokens(logits, np.array([1.0, 1.0, 0.0]), np.full(3, 0.999))
    np.testing.assert_array_equal(np.isfinite(logprobs), [True, False, True])
    assert tokens.max() < 4


def test_top_p_leaves_the_fewest_tokens_that_have_its_mass() -> None:
    """Against the definition, row by row; the log-probs stay those of the whole distribution."""
    logits = torch.randn(400, 7, generator=torch.Generator().manual_seed(3))
    probs, top_ps = torch.softmax(logits.double(), -1).numpy(), np.linspace(0.01, 1.0, 400)
    draws = uniforms(bases_of(400), np.arange(400))
    tokens, logprobs = sample_tokens(logits, np.ones(400), draws, top_ps)
    for row, token, draw, top_p in zip(probs, tokens, draws, top_ps, strict=True):
        kept = np.argsort(-row)[: 1 + int((np.cumsum(np.sort(row)[::-1]) < top_p).sum())]
        left = np.where(np.isin(np.arange(7), kept), row, 0.0)
        assert token == int((np.cumsum(left) <= draw * left.sum()).sum())
    np.testing.assert_allclose(logprobs, np.log(probs[np.arange(400), tokens]), rtol=0, atol=1e-5)
