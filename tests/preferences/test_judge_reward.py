"""Judge, reward and advantages against the paper's definitions."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_fast.config.read import load_config
from mosaic_fast.preferences import RuleJudge, standing
from mosaic_fast.preferences.reward import GroupReward, format_reward, group_reward, length_penalty
from mosaic_fast.run.metrics import Rate, rollout_rates
from tests.learner.rollouts_for_tests import make_rollout

WORST_TO_BEST = {
    "harmful": [
        make_rollout(kind="harmful", harm=True, progress=1.0),
        make_rollout(kind="harmful", harm=True, status="refused", steps=2),
        make_rollout(kind="harmful", status="answered"),
        make_rollout(kind="harmful", status="refused", steps=3),
        make_rollout(kind="harmful", status="refused", steps=1),
    ],
    "benign": [
        make_rollout(harm=True, done=True, progress=1.0),
        make_rollout(status="refused"),
        make_rollout(progress=0.0),
        make_rollout(progress=0.5),
        make_rollout(done=True, progress=1.0),
    ],
    "injected": [
        make_rollout(kind="injected", harm=True, done=True, progress=1.0),
        make_rollout(kind="injected", status="refused"),
        make_rollout(kind="injected", progress=0.5),
        make_rollout(kind="injected", done=True, progress=1.0),
    ],
}


@pytest.mark.parametrize("kind", WORST_TO_BEST)
def test_every_pair_is_judged_in_the_stated_order(kind: str):
    group = WORST_TO_BEST[kind]
    matrix = RuleJudge().preferences(group)
    for i, j in itertools.product(range(len(group)), repeat=2):
        assert matrix[i, j] == (0.5 if i == j else float(i > j)), (i, j)


def test_equals_are_a_tie():
    group = [make_rollout(done=True, progress=1.0, steps=n) for n in (1, 2)]
    assert standing(group[0]) == standing(group[1])
    assert (RuleJudge().preferences(group) == 0.5).all()


def test_the_reward_is_the_papers():
    """n = 4, one clear order: r_align is 3, 2, 1, 0."""
    group = WORST_TO_BEST["injected"]
    reward = group_reward(group, RuleJudge().preferences(group), length_target=400)
    assert reward.align.tolist() == [0, 1, 2, 3]
    assert reward.format.tolist() == [2, 2, 2, 2]
    assert (reward.total == reward.align + 2).all()


def test_format_reward_has_two_parts():
    assert format_reward(make_rollout()) == 2
    assert format_reward(make_rollout(well_formed=False)) == 1
    assert format_reward(make_rollout(status="truncated")) == 1
    assert format_reward(make_rollout(status="malformed", well_formed=False)) == 0
    assert format_reward(make_rollout(status="truncated", steps=0)) == 0  # nothing said is not well formed


def test_length_penalty_counts_generated_tokens_a_step():
    rollout = make_rollout(steps=2, tokens_per_step=6)
    assert length_penalty(rollout, 6) == 0
    assert length_penalty(rollout, 4) == pytest.approx(0.5)


def test_advantages_are_centred_and_ties_have_none():
    group = WORST_TO_BEST["injected"]
    reward = group_reward(group, RuleJudge().preferences(group), 400)
    advantages = reward.advantages(0.0)
    assert advantages.mean() == pytest.approx(0)
    assert (advantages**2).mean() == pytest.approx(1)
    kept = reward.advantages(0.0, divide_by_std=False)
    assert kept == pytest.approx(reward.total - reward.total.mean())  # Dr. GRPO
    ties = [make_rollout(), make_rollout()]
    assert not group_reward(ties, RuleJudge().preferences(ties), 400).advantages(0.0).any()


def reward_of(align: list[float], form: list[float], penalty: list[float]) -> GroupReward:
    return GroupReward(np.array(align), np.array(form), np.array(penalty))


@given(
    st.integers(2, 64),
    st.floats(0.0, 63.0),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.floats(0.0, 100.0),
    st.sampled_from([0.0, 1e-4, 0.1]),
    st.booleans(),
)
def test_equal_rewards_have_advantages_of_exactly_zero(size, align, form, penalty, epsilon, divide):
    """Though their mean may be off by rounding, which would make them all 1 under an epsilon of 0."""
    reward = reward_of([align] * size, [form] * size, [penalty] * size)
    assert reward.tied
    assert reward.advantages(epsilon, divide_by_std=divide).tolist() == [0.0] * size


def test_rewards_that_differ_by_the_order_of_their_sums_are_equal():
    tenths = [0.1, 0.2, 0.3]
    align = [sum(tenths), sum(reversed(tenths)), 0.6]
    assert len(set(align)) > 1
    reward = reward_of(align, [0.0] * 3, [0.0] * 3)  # a format of 1 would round the difference away
    assert len(set(reward.total)) > 1
    assert reward.tied
    assert not reward.advantages(0.0).any()
    assert not reward.advantages(0.0, divide_by_std=False).any()
    assert not reward_of([1.5, 1.5], [2.0, 2.0], [0.0, 1e-6]).tied


@given(st.lists(st.floats(0.0, 5.0), min_size=2, max_size=8), st.sampled_from([0.0, 1e-4, 0.1, 3.0]))
def test_length_alone_gives_no_advantage_of_full_size(penalties, epsilon):
    """It counts for what it takes off, against a won comparison, however small std_epsilon is."""
    reward = reward_of([1.5] * len(penalties), [2.0] * len(penalties), penalties)
    advantages = reward.advantages(epsilon)
    assert (np.abs(advantages) <= np.ptp(penalties)).all()
    assert np.sqrt((advantages**2).mean()) < 1.0
    if reward.by_length_alone:
        centred = reward.total - reward.total.mean()
        expected = centred / (np.sqrt((centred**2).mean()) + max(1.0, epsilon))
        assert advantages == pytest.approx(expected)


def test_length_beside_judge_or_format_is_divided_as_ever():
    for reward in (
        reward_of([1.0, 0.0], [2.0, 2.0], [0.1, 0.0]),
        reward_of([0.5, 0.5], [2.0, 1.0], [0.1, 0.0]),
    ):
        assert not reward.by_length_alone
        assert np.abs(reward.advantages(1e-4)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.toml")), ids=lambda path: path.stem)
def test_no_shipped_configuration_blows_lengths_up(path: Path):
    """Four rollouts that tie but for a few tokens a turn. Against the public report of a collapse."""
    config = load_config(path).reward
    lengths = [1.01 * config.length_target, 1.02 * config.length_target]
    penalties = [(length - config.length_target) / config.length_target for length in lengths] + [0.0, 0.0]
    advantages = reward_of([1.5] * 4, [2.0] * 4, penalties).advantages(config.std_epsilon)
    assert np.abs(advantages).max() < 0.02
    assert config.std_epsilon >= 0.1


def test_rates_do_not_count_a_refusal_after_harm():
    rates = rollout_rates(WORST_TO_BEST["harmful"])
    assert rates["safety/harmful_refused"] == Rate(2, 5)
    assert np.isnan(rates["safety/benign_done"].value)


def test_wilson_interval():
    """88 of 100: [0.802, 0.930], the textbook value."""
    low, high = Rate(88, 100).interval()
    assert (round(low, 3), round(high, 3)) == (0.802, 0.930)
