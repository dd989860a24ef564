"""Preference losses against one pair and one rollout at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels import PackedForest, forest_preference_loss, pack_forest, pairwise_preference_loss
from mosaic_kernels.preference.reference import needed_nodes
from tests.kernels.preference_for_tests import assert_forest_right, assert_pairs_right
from tests.kernels.strategies import VOCAB, forests, seeds


def draw_pairs(forest: PackedForest, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some ordered pairs, repeated and reversed ones and a rollout with itself included."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 9)) if forest.num_rollouts else 0
    pairs = rng.integers(max(forest.num_rollouts, 1), size=(count, 2))
    return pairs, rng.choice([0.0, 0.5, 1.0, 0.3], size=count)


def leaves_of(
    forest: PackedForest, seed: int, dim: int = 5, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((forest.num_nodes, dim), (VOCAB, dim), (forest.num_tokens,))
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn]


dtypes = st.sampled_from([torch.float64, torch.float32])
betas = st.sampled_from([0.1, 1.0, 5.0])


@settings(max_examples=80)
@given(forest=forests(), seed=seeds, with_reference=st.booleans(), beta=betas, dtype=dtypes)
def test_pairwise_equals_one_pair_at_a_time(
    forest: PackedForest, seed: int, with_reference: bool, beta: float, dtype: torch.dtype
) -> None:
    pairs, preference = draw_pairs(forest, seed)
    policy, reference = (leaves_of(forest, s, dtype=dtype)[2] for s in (seed, seed + 1))
    given_reference = reference.detach() if with_reference else None
    loss = pairwise_preference_loss(
        policy, given_reference, forest.trained, forest.cu_seqlens, pairs, preference, beta=beta
    )
    exact = policy.detach().double().requires_grad_()
    assert_pairs_right(loss, policy, exact, given_reference, forest, pairs, preference, beta, seed)


@settings(max_examples=80)
@given(forest=forests(), seed=seeds, with_reference=st.booleans(), beta=betas, dtype=dtypes)
def test_forest_equals_one_rollout_at_a_time(
    forest: PackedForest, seed: int, with_reference: bool, beta: float, dtype: torch.dtype
) -> None:
    """Masks and reference log-probs differ between rollouts on shared nodes."""
    pairs, preference = draw_pairs(forest, seed)
    hidden, weight, reference = leaves_of(forest, seed, dtype=dtype)
    given_reference = reference.detach() if with_reference else None
    loss = forest_preference_loss(
        hidden, weight, forest, pairs, preference, reference_logprobs=given_reference, beta=beta
    )
    assert_forest_right(loss, [hidden, weight], given_reference, forest, pairs, preference, beta, seed)


@given(forest=forests(), seed=seeds)
def test_needed_edges_are_those_some_pair_weighs(forest: PackedForest, seed: int) -> None:
    pairs, _ = draw_pairs(forest, seed)
    trained_by = np.zeros((forest.num_rollouts, forest.num_nodes), np.int64)
    owner = np.repeat(np.arange(forest.num_rollouts), np.diff(forest.cu_seqlens))
    trained_by[owner[forest.trained], forest.node_index[forest.trained]] = 1
    expected = (trained_by[pairs[:, 0]] != trained_by[pairs[:, 1]]).any(axis=0) if len(pairs) else []
    assert needed_nodes(forest, pairs).tolist() == list(expected) if len(pairs) else True


def test_the_shared_trunk_never_reaches_the_lm_head() -> None:
    """Poisoned hidden states where every edge cancels change neither loss nor gradient."""
    forest = pack_forest([[5, 6, 0, 1], [5, 6, 0, 2], [5, 6, 0, 2]])
    hidden, weight, _ = leaves_of(forest, 0)
    poisoned = hidden.detach().clone()
    poisoned[:2] = torch.nan
    poisoned.requires_grad_()
    pairs, preference = [[0, 1], [2, 0]], [1.0, 0.5]
    losses = [
        forest_preference_loss(h, weight, forest, np.array(pairs), np.array(preference), beta=1.0)
        for h in (hidden, poisoned)
    ]
    assert torch.equal(*losses)
    (grad,) = torch.autograd.grad(losses[1].sum(), poisoned)
    assert torch.isfinite(grad).all()
    assert not grad[:2].any()


def test_reference_on_a_shared_node_may_differ_between_rollouts() -> None:
    """The policy's share of the trunk cancels, the reference's does not."""
    forest = pack_forest([[5, 6, 1], [5, 6, 1]])
    hidden, weight, _ = leaves_of(forest, 0)
    reference = torch.tensor([0.0, -1.0, -2.0, 0.0, -3.0, -5.0], dtype=torch.float64)
    loss = forest_preference_loss(
        hidden, weight, forest, np.array([[0, 1]]), np.array([1.0]), reference_logprobs=reference, beta=0.5
    )
    x = 0.5 * (0 - (-3.0 + 8.0))
    assert abs(float(loss[0].detach()) - np.log1p(np.exp(-x))) < 1e-12


def test_masked_values_may_be_anything() -> None:
    policy = torch.tensor([torch.nan, -1.0, -torch.inf, -2.0], requires_grad=True)
    mask = torch.tensor([False, True, False, True])
    loss = pairwise_preference_loss(
        policy, policy.detach() * 2, mask, np.array([0, 2, 4]), np.array([[0, 1]]), np.array([1.0]), beta=1.0
    )
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()
    assert policy.grad[0] == policy.grad[2] == 0


def test_extreme_margins_stay_finite() -> None:
    policy = torch.tensor([0.0, 1e4], dtype=torch.float64, requires_grad=True)
    mask = np.array([True, True])
    loss = pairwise_preference_loss(
        policy,
        None,
        mask,
        np.array([0, 1, 2]),
        np.array([[0, 1], [1, 0], [0, 1]]),
        np.array([1.0, 1.0, 0.5]),
        beta=1.0,
    )
    assert loss.tolist() == [1e4, 0.0, 5e3]
    (grad,) = torch.autograd.grad(loss.sum(), policy)
    assert grad.tolist() == [-1.5, 1.5]


def test_each_gradient_switched_off_and_gradcheck() -> None:
    forest = pack_forest([[5, 6, 1], [5, 6, 2], [3, 4]])
    hidden, weight, reference = leaves_of(forest, 0)
    pairs, preference = np.array([[0, 1], [2, 0]]), np.array([1.0, 0.3])

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return forest_preference_loss(
            h, w, forest, pairs, preference, reference_logprobs=reference.detach(), beta=0.7
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    full = torch.autograd.grad(loss(hidden, weight).sum(), (hidden, weight))
    only_hidden = torch.autograd.grad(loss(hidden, weight.detach()).sum(), hidden)[0]
    only_weight = torch.autograd.grad(loss(hidden.detach(), weight).sum(), weight)[0]
    assert torch.equal(only_hidden, full[0])
    assert torch.equal(only_weight, full[1])
    policy = reference[: forest.num_tokens]
    assert torch.autograd.gradcheck(
        lambda s: pairwise_preference_loss(
            s, None, forest.trained, forest.cu_seqlens, pairs, preference, beta=0.7
        ),
        policy.detach().requires_grad_(),
    )


def test_nothing_to_compare() -> None:
    none = np.zeros((0, 2), np.int64), np.zeros(0)
    empty = pack_forest([])
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(VOCAB, 4, requires_grad=True)
    loss = forest_preference_loss(hidden, weight, empty, *none, beta=1.0)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert pairwise_preference_loss(
        torch.zeros(0), None, empty.trained, empty.cu_seqlens, *none, beta=1.0
    ).shape == (0,)
    untrained = pack_forest([[1, 2], [1, 3]], [[False, False]] * 2)
    loss = forest_preference_loss(
        torch.zeros(3, 4), weight, untrained, np.array([[0, 1]]), np.array([1.0]), beta=1.0
    )
    assert abs(float(loss.detach()) - np.log(2)) < 1e-6


def test_refusals() -> None:
    forest = pack_forest([[5, 6, 1], [5, 6, 2]])
    hidden, weight, policy = leaves_of(forest, 0)
    pairs, preference = np.array([[0, 1]]), np.array([1.0])
    with pytest.raises(ValueError, match=r"pairs holds 2, outside \[0, 2\)"):
        forest_preference_loss(hidden, weight, forest, pairs + 1, preference, beta=1.0)
    with pytest.raises(ValueError, match=r"preference must lie in \[0, 1\]"):
        forest_preference_loss(hidden, weight, forest, pairs, preference * 2, beta=1.0)
    with pytest.raises(ValueError, match=r"hidden must be \[U=4, D\]"):
        forest_preference_loss(hidden[:3], weight, forest, pairs, preference, beta=1.0)
    with pytest.raises(ValueError, match="'triton' does not run on cpu"):
        forest_preference_loss(hidden, weight, forest, pairs, preference, beta=1.0, backend="triton")
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T=6"):
        pairwise_preference_loss(
            policy, None, forest.trained, np.array([0, 2, 5]), pairs, preference, beta=1.0
        )
    with pytest.raises(ValueError, match="mask must be bool"):
        pairwise_preference_loss(
            policy, None, forest.trained * 1, forest.cu_seqlens, pairs, preference, beta=1.0
        )
