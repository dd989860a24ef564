"""Intervals against published values and against what they must satisfy."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_fast.evaluate.results import mean_of, rate_interval
from mosaic_fast.run.metrics import Rate


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombe_s_table(hits: int, total: int, low: float, high: float):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    per_task = [Rate(1, 1)] * hits + [Rate(0, 1)] * (total - hits)
    assert rate_interval(per_task) == pytest.approx((low, high), abs=5e-5)


def test_samples_that_repeat_their_task_are_no_further_evidence():
    """k equal samples a task: the variance of m tasks with m - 1 in its denominator, whatever k is."""
    tasks = [Rate(7, 7)] * 6 + [Rate(0, 7)] * 14
    assert rate_interval(tasks) == pytest.approx(Rate(0.3 * 19, 19).interval(1.959963984540054))


def test_samples_that_agree_with_chance_count_in_full():
    """Every task half right: nothing hangs together, so all cases count."""
    assert rate_interval([Rate(5, 10)] * 8) == pytest.approx(Rate(40, 80).interval(1.959963984540054))


def test_tokens_of_tasks_without_a_hit_are_as_many_cases_as_tasks():
    """0 of 30,000 tokens in 20 tasks does not prove a rate below 0.02%."""
    assert rate_interval([Rate(0, 1500)] * 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_nothing_counted_has_no_interval():
    assert all(math.isnan(x) for x in rate_interval([Rate(0, 0)]))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_an_interval_holds_its_rate_and_is_never_narrower_than_independent_cases(
    drawn: list[tuple[int, int]],
):
    per_task = [Rate(min(pair), max(pair)) for pair in drawn]
    total = sum(rate.total for rate in per_task)
    if not total:
        return
    pooled = Rate(sum(rate.hits for rate in per_task), total)
    low, high = rate_interval(per_task)
    plain_low, plain_high = pooled.interval(1.959963984540054)
    assert 0.0 <= low <= pooled.value + 1e-12
    assert pooled.value - 1e-12 <= high <= 1.0
    assert high - low >= plain_high - plain_low - 1e-12


def test_a_mean_has_its_normal_interval():
    """s = 1 of 4 values: half a width of 1.96 / 2."""
    x = math.sqrt(0.75)
    mean = mean_of([10 - x, 10 + x, 10 - x, 10 + x])
    assert (mean.value, mean.low, mean.high) == pytest.approx((10.0, 10 - 0.98, 10 + 0.98), abs=1e-4)
    assert math.isnan(mean_of([3.0]).low)
