"""The preference kernels against one pair and one rollout at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels import PackedForest, forest_preference_loss, pack_forest, pairwise_preference_loss
from mosaic_kernels.forest.layout import IntArray
from mosaic_kernels.oracle import preference_loss_of_rollouts
from mosaic_kernels.preference import triton as preference_triton
from mosaic_kernels.selfcheck import KernelMismatch, run_check
from tests.kernels.preference_for_tests import assert_forest_right, assert_pairs_right
from tests.kernels.strategies import VOCAB, forests, seeds
from tests.kernels.triton.machine import machine, on_machine

betas = st.sampled_from([0.1, 1.0, 5.0])
dtypes = st.sampled_from(machine().dtypes)
some_forests = forests(max_rollouts=8, max_length=machine().max_length)


def draw_pairs(forest: PackedForest, seed: int) -> tuple[IntArray, np.ndarray]:
    """Ordered pairs, repeated and reversed ones and a rollout with itself included; soft labels and ties."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 12)) if forest.num_rollouts else 0
    pairs = rng.integers(max(forest.num_rollouts, 1), size=(count, 2))
    return pairs, rng.choice([0.0, 0.5, 1.0, 0.3], size=count)


def awkward_group() -> PackedForest:
    """Forks, a duplicate, a strict prefix, a stranger, one token, none; masks differ on shared nodes."""
    trunk = [1, 2, 3, 4]
    sequences = [
        [*trunk, 5, 6, 0],
        [*trunk, 5, 2],
        trunk[:2] + [0] * 9,
        trunk,
        [6, 5, 4],
        [2],
        [],
        [*trunk, 5, 2],
    ]
    rng = np.random.default_rng(1)
    return pack_forest(sequences, [rng.random(len(s)) * (np.arange(len(s)) > 0) > 0.2 for s in sequences])


def log_probs(count: int, seed: int) -> torch.Tensor:
    return -3 * torch.rand(count, generator=torch.Generator().manual_seed(seed))


def weighted(loss: torch.Tensor, seed: int) -> torch.Tensor:
    weight = torch.randn(len(loss), generator=torch.Generator().manual_seed(seed))
    return (loss * weight.to(loss)).sum()


def check_pairwise(
    forest: PackedForest, seed: int, with_reference: bool, beta: float, dtype: torch.dtype
) -> None:
    """What the mask hides is NaN."""
    pairs, preference = draw_pairs(forest, seed)
    mask = torch.from_numpy(forest.trained)
    policy, reference = on_machine(
        torch.where(mask, log_probs(forest.num_tokens, seed), torch.nan).to(dtype),
        torch.where(mask, log_probs(forest.num_tokens, seed + 1), torch.nan),
    )
    exact = policy.double().cpu().requires_grad_()
    given_reference = reference if with_reference else None
    loss = pairwise_preference_loss(
        policy.requires_grad_(), given_reference, forest.trained, forest.cu_seqlens, pairs, preference,
        beta=beta, backend="triton",
    )  # fmt: skip
    assert_pairs_right(loss, policy, exact, given_reference, forest, pairs, preference, beta, seed)


@settings(max_examples=machine().examples)
@given(forest=some_forests, seed=seeds, with_reference=st.booleans(), beta=betas, dtype=dtypes)
@pytest.mark.usefixtures("poisoned_memory")
def test_pairwise_equals_one_pair_at_a_time(
    forest: PackedForest, seed: int, with_reference: bool, beta: float, dtype: torch.dtype
) -> None:
    check_pairwise(forest, seed, with_reference, beta, dtype)


@pytest.mark.parametrize("dtype", machine().dtypes, ids=str)
@pytest.mark.parametrize("with_reference", [True, False])
def test_pairwise_of_an_awkward_group_equals_one_pair_at_a_time(
    with_reference: bool, dtype: torch.dtype
) -> None:
    check_pairwise(awkward_group(), 7, with_reference, 0.3, dtype)


def check_forest(
    forest: PackedForest, seed: int, with_reference: bool, beta: float, dtype: torch.dtype
) -> None:
    """Masks and reference log-probs differ between rollouts on shared nodes."""
    pairs, preference = draw_pairs(forest, seed)
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(s, 20, generator=generator).to(dtype) for s in (forest.num_nodes, VOCAB)]
    hidden, weight = leaves = [x.requires_grad_() for x in on_machine(*inputs)]
    reference = on_machine(log_probs(forest.num_tokens, seed + 1))[0] if with_reference else None
    loss = forest_preference_loss(
        hidden, weight, forest, pairs, preference, reference_logprobs=reference, beta=beta, backend="triton"
    )
    assert_forest_right(loss, leaves, reference, forest, pairs, preference, beta, seed)


@settings(max_examples=machine().examples)
@given(forest=some_forests, seed=seeds, with_reference=st.booleans(), beta=betas, dtype=dtypes)
@pytest.mark.usefixtures("poisoned_memory")
def test_forest_equals_one_rollout_at_a_time(
    forest: PackedForest, seed: int, with_reference: bool, beta: float, dtype: torch.dtype
) -> None:
    check_forest(forest, seed, with_reference, beta, dtype)


@pytest.mark.parametrize("dtype", machine().dtypes, ids=str)
@pytest.mark.parametrize("with_reference", [True, False])
def test_forest_of_an_awkward_group_equals_one_rollout_at_a_time(
    with_reference: bool, dtype: torch.dtype
) -> None:
    check_forest(awkward_group(), 7, with_reference, 0.3, dtype)


def test_64_long_rollouts_of_one_group_all_judged() -> None:
    """2,016 pairs, rollouts of several blocks and of one token, and one without a trained token."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(1000, size=30).tolist()
    lengths = [1200, 1, 0, *rng.integers(5, 60, size=61).tolist()]
    forest = pack_forest([trunk + rng.integers(1000, size=length).tolist() for length in lengths])
    pairs = np.array([(i, j) for i in range(64) for j in range(i)])
    preference = rng.choice([0.0, 0.5, 1.0], size=len(pairs))
    policy = on_machine(log_probs(forest.num_tokens, 0))[0].requires_grad_()
    loss = pairwise_preference_loss(
        policy, None, forest.trained, forest.cu_seqlens, pairs, preference, beta=0.05, backend="triton"
    )
    exact = policy.detach().double().cpu().requires_grad_()
    assert_pairs_right(loss, policy, exact, None, forest, pairs, preference, 0.05, 0)


def test_the_shared_trunk_never_reaches_the_lm_head() -> None:
    """Poisoned hidden states where every edge cancels change neither loss nor gradient.

    The edge to the last 2 is trained by two of three rollouts, cancels in no pair of the first, and counts.
    """
    forest = pack_forest([[5, 6, 0, 1], [5, 6, 0, 2], [5, 6, 0, 2]])
    generator = torch.Generator().manual_seed(0)
    hidden, weight = on_machine(*(torch.randn(s, 16, generator=generator) for s in (forest.num_nodes, VOCAB)))
    poisoned = hidden.clone()
    poisoned[:2] = torch.nan
    losses, grads = [], []
    for rows in (hidden, poisoned):
        rows.requires_grad_()
        loss = forest_preference_loss(
            rows, weight, forest, np.array([[0, 1], [2, 0]]), np.array([1.0, 0.5]), beta=1.0, backend="triton"
        )
        losses.append(loss)
        grads.append(torch.autograd.grad(loss.sum(), rows)[0])
    assert torch.equal(*losses)
    assert torch.equal(*grads)
    exact = preference_loss_of_rollouts(
        hidden.detach().double(), weight.double(), forest, [(0, 1), (2, 0)], [1.0, 0.5], beta=1.0
    )
    assert torch.allclose(losses[1].double(), exact, rtol=1e-5)
    assert not grads[1][:2].any()
    assert grads[1][2].any()


def test_extreme_margins_stay_finite() -> None:
    policy = on_machine(torch.tensor([0.0, 1e4]))[0].requires_grad_()
    pairs, preference = np.array([[0, 1], [1, 0], [0, 1]]), np.array([1.0, 1.0, 0.5])
    loss = pairwise_preference_loss(
        policy,
        None,
        np.array([True, True]),
        np.array([0, 1, 2]),
        pairs,
        preference,
        beta=1.0,
        backend="triton",
    )
    assert loss.tolist() == [1e4, 0.0, 5e3]
    assert torch.autograd.grad(loss.sum(), policy)[0].tolist() == [-1.5, 1.5]


def test_a_small_loss_and_its_gradient_keep_their_digits() -> None:
    """log(1 + exp(-15)) and sigmoid(15) - 1: computed as they read, fp32 would leave two digits."""
    policy = on_machine(torch.tensor([15.0, 0.0]))[0].requires_grad_()
    loss = pairwise_preference_loss(
        policy, None, np.array([True, True]), np.array([0, 1, 2]), np.array([[0, 1]]), np.array([1.0]),
        beta=1.0, backend="triton",
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss.sum(), policy)
    assert abs(float(loss.detach()) / np.log1p(np.exp(-15.0)) - 1) < 1e-5
    assert abs(float(grad[0]) / (-1 / (1 + np.exp(15.0))) - 1) < 1e-5


def test_a_nan_that_counts_shows() -> None:
    policy = on_machine(torch.tensor([torch.nan, 0.0, 0.0]))[0].requires_grad_()
    loss = pairwise_preference_loss(
        policy, None, np.array([True] * 3), np.array([0, 1, 2, 3]), np.array([[0, 1], [1, 2]]), np.ones(2),
        beta=1.0, backend="triton",
    )  # fmt: skip
    assert loss.isnan().tolist() == [True, False]
    assert torch.autograd.grad(loss.sum(), policy)[0].isnan().tolist() == [True, True, False]


def test_nothing_to_compare() -> None:
    none = np.zeros((0, 2), np.int64), np.zeros(0)
    empty = pack_forest([])
    hidden, weight = (x.requires_grad_() for x in on_machine(torch.zeros(0, 16), torch.zeros(VOCAB, 16)))
    loss = forest_preference_loss(hidden, weight, empty, *none, beta=1.0, backend="triton")
    assert loss.shape == (0,)
    loss.sum().backward()
    untrained = pack_forest([[1, 2], [1, 3]], [[False, False]] * 2)
    loss = forest_preference_loss(
        on_machine(torch.zeros(3, 16))[0], weight, untrained, np.array([[0, 1]]), np.array([1.0]),
        beta=1.0, backend="triton",
    )  # fmt: skip
    assert abs(float(loss.detach()) - np.log(2)) < 1e-6
    loss.sum().backward()


def test_the_same_call_gives_the_same_bits() -> None:
    forest = pack_forest([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [7, 8]])
    runs = []
    for _ in range(2):
        leaf = on_machine(log_probs(forest.num_tokens, 0))[0].requires_grad_()
        loss = pairwise_preference_loss(
            leaf, None, forest.trained, forest.cu_seqlens, np.array([[0, 1], [2, 3], [1, 2]]), np.ones(3),
            beta=1.0, backend="triton",
        )  # fmt: skip
        runs.append([loss, torch.autograd.grad(weighted(loss, 0), leaf)[0]])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_fp64_is_refused_by_name() -> None:
    policy = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="for fp64 use backend='reference'"):
        pairwise_preference_loss(
            on_machine(policy)[0], None, np.array([True] * 2), np.array([0, 1, 2]), np.array([[0, 1]]),
            np.ones(1), beta=1.0, backend="triton",
        )  # fmt: skip


@pytest.mark.parametrize("reference", [None, torch.float32])
def test_the_self_check_passes_and_sees_a_kernel_that_is_off(
    reference: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, variant = machine().device, (torch.float32, reference)
    for dtype in machine().dtypes:
        found = preference_triton.deviations(device, (dtype, reference))
        assert set(found) == {"loss", "tree loss", "dtokens", "dedges"}
        assert all(x.error <= x.limit for x in found.values())

    class Off:
        @staticmethod
        def apply(*args: object) -> torch.Tensor:
            return exact.apply(*args) * (1 + 1e-4)

    exact = preference_triton._PreferenceLoss
    monkeypatch.setattr(preference_triton, "_PreferenceLoss", Off)
    with pytest.raises(
        KernelMismatch, match=r"pairwise_preference_loss: .*: loss, tree loss, dtokens, dedges off"
    ):
        run_check("pairwise_preference_loss", device, variant, preference_triton.deviations)
