"""Losses against plain loops over tokens, parts against the whole, special cases against each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosaic_fast.losses import LossBatch, PairwiseLoss, SurrogateLoss, normalised_weights

finite = st.floats(-3, 0, width=32)


def batch_of(
    rows: list[tuple[float, float, float, float, bool]], total: float
) -> tuple[torch.Tensor, LossBatch]:
    policy, start, reference, advantages = (
        torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in range(4)
    )
    weights = torch.tensor([float(row[4]) / total for row in rows], dtype=torch.float64)
    return policy.requires_grad_(), LossBatch(start, reference, advantages, weights)


def by_hand(rows: list[tuple[float, float, float, float, bool]], total: float, loss: SurrogateLoss) -> float:
    value = 0.0
    for policy, start, reference, advantage, trained in rows:
        if trained:
            ratio = math.exp(policy - start)
            clipped = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
            difference = reference - policy
            value -= min(ratio * advantage, clipped * advantage)
            value += loss.kl_weight * (math.exp(difference) - difference - 1)
    return value / total


rows_strategy = st.lists(
    st.tuples(finite, finite, finite, st.floats(-2, 2, width=32), st.booleans()), min_size=1
)


@given(rows_strategy, st.floats(0.1, 0.5), st.floats(0.1, 0.9), st.floats(0, 1))
def test_value_is_the_equations(rows, low, high, weight):
    loss = SurrogateLoss("token", low, high, weight)
    policy, batch = batch_of(rows, 7.0)
    value, _ = loss(policy, batch)
    assert float(value.detach()) == pytest.approx(by_hand(rows, 7.0, loss), abs=1e-12)


@given(rows_strategy, st.integers(0, 30))
def test_parts_add_up_to_the_whole(rows, cut):
    loss = SurrogateLoss("token", 0.2, 0.3, 0.1)
    policy, batch = batch_of(rows, 5.0)
    whole, metrics = loss(policy, batch)
    whole.backward()
    gradients, value, clipped = [], 0.0, 0.0
    for part in (rows[:cut], rows[cut:]):
        if part:
            part_policy, part_batch = batch_of(part, 5.0)
            part_value, part_metrics = loss(part_policy, part_batch)
            part_value.backward()
            gradients.append(part_policy.grad)
            value += float(part_value.detach())
            clipped += part_metrics["policy/clip_frac"].sum
    torch.testing.assert_close(torch.cat(gradients), policy.grad, rtol=0, atol=1e-15)
    assert value == pytest.approx(float(whole.detach()), abs=1e-12)
    assert clipped == metrics["policy/clip_frac"].sum


def test_clipping_stops_the_gradient_only_on_its_own_side():
    rows = [(0.5, 0.0, 0.5, 1.0, True), (0.5, 0.0, 0.5, -1.0, True), (-0.5, 0.0, -0.5, -1.0, True)]
    policy, batch = batch_of(rows, 3.0)
    value, metrics = SurrogateLoss("token", 0.2, 0.2, 0.0)(policy, batch)
    value.backward()
    assert policy.grad is not None
    assert policy.grad[0] == 0
    assert policy.grad[1] > 0
    assert policy.grad[2] == 0
    assert metrics["policy/clip_frac"].sum == 2


def whole_step(lengths: list[int], **changes) -> tuple[torch.Tensor, LossBatch]:
    """Random log-probs of rollouts of these lengths; their first tokens do not count."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    policy, start, reference = -torch.rand(3, total, generator=generator, dtype=torch.float64)
    bounds = torch.tensor([0, *np.cumsum(lengths)])
    trained = np.ones(total, np.bool_)
    trained[bounds[:-1].numpy()] = False
    weights = normalised_weights(np.ones(total), trained, bounds.numpy(), "sequence", 1.0)
    advantages = torch.repeat_interleave(
        torch.randn(len(lengths), generator=generator, dtype=torch.float64), bounds.diff()
    )
    batch = LossBatch(start, reference, advantages, torch.from_numpy(weights), bounds, **changes)
    return policy.requires_grad_(), batch


def test_gspo_of_one_advantage_a_rollout_is_the_sequence_form():
    """Value and gradient of equations 5 to 7, whose ratio carries the gradient of every token."""
    policy, batch = whole_step([4, 6, 3])
    assert batch.cu_seqlens is not None
    value, _ = SurrogateLoss("sequence", 0.1, 0.1)(policy, batch)
    (got,) = torch.autograd.grad(value, policy)
    terms = []
    for a, b in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ratio = (policy - batch.old_logprobs)[a + 1 : b].mean().exp()
        advantage = batch.advantages[a]
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage))
    expected = torch.stack(terms).mean()
    (gradient,) = torch.autograd.grad(expected, policy)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-14)
    torch.testing.assert_close(got, gradient, rtol=0, atol=1e-15)
    assert got.abs().max() > 0


def test_cispo_keeps_the_gradient_that_grpo_clips_away():
    rows = [(0.5, 0.0, 0.5, 1.0, True)]
    policy, batch = batch_of(rows, 1.0)
    value, metrics = SurrogateLoss("detached", 0.2, 0.2)(policy, batch)
    value.backward()
    assert policy.grad is not None
    assert float(policy.grad[0]) == pytest.approx(-1.2)
    assert metrics["policy/clip_frac"].sum == 1


@pytest.mark.parametrize("kind", ["dpo", "dpo_norm", "ipo"])
def test_a_tie_pulls_two_rollouts_together_and_equal_margins_are_left_alone(kind):
    labels = {"pairs": torch.tensor([[0, 1]]), "preference": torch.tensor([0.5], dtype=torch.float64)}
    policy, batch = whole_step([4, 4], **labels)
    assert batch.reference_logprobs is not None
    loss = PairwiseLoss(kind, beta=0.5)
    (gradient,) = torch.autograd.grad(loss(policy, batch)[0], policy)
    margins = (policy - batch.reference_logprobs).detach()
    ahead = int(margins[5:8].sum() > margins[1:4].sum())
    assert gradient[1 + 4 * ahead] > 0  # the gradient descends: the one ahead comes down
    even = batch.reference_logprobs.clone().requires_grad_()
    (at_rest,) = torch.autograd.grad(loss(even, batch)[0], even)
    assert at_rest.abs().max() < 1e-15


@pytest.mark.parametrize("kind", ["dpo", "dpo_norm", "ipo"])
def test_turning_a_pair_round_changes_nothing(kind):
    values = []
    for pair, label in (([0, 1], 0.8), ([1, 0], 0.2)):
        labels = {
            "pairs": torch.tensor([pair]),
            "preference": torch.tensor([label], dtype=torch.float64),
        }
        policy, batch = whole_step([4, 6], **labels)
        value, metrics = PairwiseLoss(kind, beta=0.5)(policy, batch)
        values.append((float(value.detach()), float(metrics["policy/pair_accuracy"].sum)))
    assert values[0] == pytest.approx(values[1], abs=1e-14)


def test_a_token_that_does_not_count_may_be_anything():
    """NaN at weight 0 reaches neither value nor gradient, of any loss."""
    labels = {"pairs": torch.tensor([[0, 1]]), "preference": torch.tensor([1.0], dtype=torch.float64)}
    losses = [SurrogateLoss(ratio, kl_weight=0.1) for ratio in ("token", "sequence", "detached")]
    for loss in (*losses, *(PairwiseLoss(kind) for kind in ("dpo", "dpo_norm", "ipo"))):
        policy, batch = whole_step([4, 6], **labels)
        clean, _ = loss(policy, batch)
        assert batch.reference_logprobs is not None
        for values in (batch.old_logprobs, batch.reference_logprobs, batch.advantages):
            values[0] = torch.nan
        poisoned = policy.detach().clone()
        poisoned[0] = -torch.inf
        value, _ = loss(poisoned.requires_grad_(), batch)
        (gradient,) = torch.autograd.grad(value, poisoned)
        assert float(value.detach()) == float(clean.detach())
        assert torch.isfinite(gradient).all()
        assert gradient[0] == 0


def test_normalisers():
    trained, bounds = np.array([False, True, False, True, True, True]), np.array([0, 2, 6])
    for how, expected in (
        ("token", [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ("sequence", [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
        ("constant", [1 / 20, 1 / 20, 1 / 20, 1 / 20]),
    ):
        weights = normalised_weights(np.ones(6), trained, bounds, how, 10.0)
        assert weights[trained] == pytest.approx(expected)
        assert not weights[~trained].any()
        assert not normalised_weights(np.zeros(6), trained, bounds, how, 10.0).any()
