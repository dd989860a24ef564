"""The GRPO loss against a plain loop over tokens, and its parts against the whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosaic_fast.loss import GRPOLoss, LossBatch

finite = st.floats(-3, 0, width=32)


def batch_of(
    rows: list[tuple[float, float, float, float, bool]], total: float
) -> tuple[torch.Tensor, LossBatch]:
    policy, start, reference, advantages = (
        torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in range(4)
    )
    mask = torch.tensor([row[4] for row in rows])
    return policy.requires_grad_(), LossBatch(start, reference, advantages, mask, total)


def by_hand(rows: list[tuple[float, float, float, float, bool]], total: float, loss: GRPOLoss) -> float:
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
    loss = GRPOLoss(low, high, weight)
    policy, batch = batch_of(rows, 7.0)
    value, _ = loss(policy, batch)
    assert float(value.detach()) == pytest.approx(by_hand(rows, 7.0, loss), abs=1e-12)


@given(rows_strategy, st.integers(0, 30))
def test_parts_add_up_to_the_whole(rows, cut):
    loss = GRPOLoss(0.2, 0.3, 0.1)
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
    value, metrics = GRPOLoss(0.2, 0.2, 0.0)(policy, batch)
    value.backward()
    assert policy.grad is not None
    assert policy.grad[0] == 0
    assert policy.grad[1] > 0
    assert policy.grad[2] == 0
    assert metrics["policy/clip_frac"].sum == 2
