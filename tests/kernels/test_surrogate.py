"""The clipped surrogate against one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels import clipped_surrogate
from mosaic_kernels.magnitudes import surrogate_magnitudes
from mosaic_kernels.oracle import surrogate_of_tokens
from mosaic_kernels.rounding import weighting, worst_of
from tests.kernels.criterion import assert_right
from tests.kernels.strategies import seeds


def problem(tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """policy (differentiable), start, advantages, weights, reference; some weights and advantages are 0."""
    generator = torch.Generator().manual_seed(seed)
    policy, start, advantages, weights, reference = torch.randn(5, tokens, generator=generator).double()
    weights = torch.where(weights < -0.5, 0.0, weights)
    advantages = torch.where(advantages.abs() < 0.2, 0.0, advantages)
    # About a third of the ratios stay inside the usual clip range.
    policy, reference = start + 0.5 * policy, start + 0.5 * reference
    values = [x.to(dtype) for x in (policy, start, advantages, weights, reference)]
    values[0].requires_grad_()
    return values


@settings(max_examples=80)
@given(
    tokens=st.integers(0, 40),
    seed=seeds,
    clips=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, 3.0)]),
    kl_weight=st.sampled_from([None, 0.0, 0.04, 1.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_equals_one_token_at_a_time(
    tokens: int, seed: int, clips: tuple[float, float], kl_weight: float | None, dtype: torch.dtype
) -> None:
    policy, start, advantages, weights, reference = problem(tokens, seed, dtype)
    exact = policy.detach().double().requires_grad_()
    clip_low, clip_high = clips
    loss = clipped_surrogate(
        policy, start, advantages, weights, reference_logprobs=None if kl_weight is None else reference,
        clip_low=clip_low, clip_high=clip_high, kl_weight=kl_weight or 0.0,
    )  # fmt: skip
    start, advantages, weights, reference = (x.double() for x in (start, advantages, weights, reference))
    expected = surrogate_of_tokens(
        exact, start.tolist(), advantages.tolist(), weights.tolist(), reference.tolist(),
        clip_low=clip_low, clip_high=clip_high, kl_weight=kl_weight or 0.0,
    )  # fmt: skip
    drawn = weighting([expected], seed)
    magnitudes = surrogate_magnitudes(
        exact, start, advantages, weights, None if kl_weight is None else reference, drawn[0],
        clip_low=clip_low, clip_high=clip_high, kl_weight=kl_weight or 0.0, dtype=dtype,
    )  # fmt: skip
    off = worst_of([loss], [policy], [expected], [exact], drawn, magnitudes, terms=1)
    assert_right(("loss", "dpolicy"), off)


def test_docstring_example() -> None:
    policy = torch.tensor([0.0, 2.0, 1.0]).clamp(min=1).log()
    loss = clipped_surrogate(
        policy, torch.zeros(3), torch.tensor([1.0, 1, -1]), torch.tensor([1.0, 1, 0]),
        clip_low=0.2, clip_high=0.2,
    )  # fmt: skip
    assert torch.allclose(loss, torch.tensor([-1.0, -1.2, 0.0]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_of_zero_hides_any_value(bad: float) -> None:
    """Dropped tokens carry what a broken sampler left: neither loss nor gradient may see it."""
    values = problem(6, 0)
    policy, start, advantages, weights, reference = (x.detach().clone() for x in values)
    weights[:] = 1
    clean = policy.clone().requires_grad_()
    for index, poisoned in enumerate((policy, start, advantages, reference)):
        poisoned[index] = bad
        weights[index] = 0
    policy.requires_grad_()
    options = {"clip_low": 0.2, "clip_high": 0.2, "kl_weight": 0.1}
    losses = [
        clipped_surrogate(policy, start, advantages, weights, reference_logprobs=reference, **options),
        clipped_surrogate(clean, values[1], values[2], weights, reference_logprobs=values[4], **options),
    ]
    assert torch.equal(*losses)
    assert not losses[0][:4].any()
    grads = [torch.autograd.grad(x.sum(), y)[0] for x, y in zip(losses, (policy, clean), strict=True)]
    assert torch.equal(*grads)
    assert not grads[0][:4].any()
    assert grads[0][4:].all()


def test_gradcheck_and_only_the_policy_has_a_gradient() -> None:
    policy, *others = problem(30, 3)
    start, advantages, weights, reference = (x.requires_grad_() for x in others)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return clipped_surrogate(
            x, start, advantages, weights, reference_logprobs=reference,
            clip_low=0.2, clip_high=0.3, kl_weight=0.1,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, policy)
    found = torch.autograd.grad(
        loss(policy).sum(), [policy, start, advantages, weights, reference], allow_unused=True
    )
    assert found[0] is not None
    assert found[1:] == (None, None, None, None)


def test_the_kl_of_nearly_equal_policies_keeps_its_digits() -> None:
    """exp(d) - d - 1 in fp32 would be rounding only."""
    policy = torch.full((1,), -2.0, requires_grad=True)
    loss = clipped_surrogate(
        policy, policy.detach(), torch.zeros(1), torch.ones(1), reference_logprobs=policy.detach() + 2**-10,
        clip_low=0.2, clip_high=0.2, kl_weight=1.0,
    )  # fmt: skip
    assert abs(float(loss.detach()) / (2**-21 * (1 + 2**-10 / 3)) - 1) < 1e-3


def test_low_precision_log_probs_give_fp32() -> None:
    values = problem(20, 1, torch.bfloat16)
    loss = clipped_surrogate(*values[:4], clip_low=0.2, clip_high=0.2)
    assert loss.dtype == torch.float32
    wide = [x.detach().float() for x in values]
    assert torch.equal(loss, clipped_surrogate(*wide[:4], clip_low=0.2, clip_high=0.2))
    assert torch.autograd.grad(loss.sum(), values[0])[0].dtype == torch.bfloat16


def test_a_ratio_that_overflows_is_clipped() -> None:
    """exp(200) is inf in fp32: with a positive advantage, or none, the bound counts and the gradient is 0."""
    policy = torch.zeros(3, requires_grad=True)
    loss = clipped_surrogate(
        policy, torch.full((3,), -200.0), torch.tensor([1.0, 0.0, 2.0]), torch.ones(3),
        clip_low=0.2, clip_high=0.25,
    )  # fmt: skip
    assert loss.tolist() == [-1.25, 0.0, -2.5]
    assert not torch.autograd.grad(loss.sum(), policy)[0].any()


def test_a_broken_value_that_counts_shows() -> None:
    """Only a weight of 0 hides a NaN."""
    policy = torch.tensor([torch.nan, 0.0, 0.0], requires_grad=True)
    advantages = torch.tensor([1.0, torch.nan, 1.0])
    loss = clipped_surrogate(policy, torch.zeros(3), advantages, torch.ones(3), clip_low=0.2, clip_high=0.2)
    assert loss.isnan().tolist() == [True, True, False]
    assert torch.autograd.grad(loss.sum(), policy)[0].isnan().tolist() == [True, True, False]


def test_refusals() -> None:
    policy, start, advantages, weights, reference = problem(5, 0)
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    with pytest.raises(ValueError, match=r"advantages has shape \(4,\), expected \(5,\)"):
        clipped_surrogate(policy, start, advantages[:4], weights, **clips)
    with pytest.raises(ValueError, match=r"weights must be floating, got torch.bool"):
        clipped_surrogate(policy, start, advantages, weights > 0, **clips)
    with pytest.raises(ValueError, match="policy_logprobs must be floating"):
        clipped_surrogate(policy[None], start, advantages, weights, **clips)
    with pytest.raises(ValueError, match=r"clip_low must lie in \[0, 1\], got 1.5"):
        clipped_surrogate(policy, start, advantages, weights, clip_low=1.5, clip_high=0.2)
    with pytest.raises(ValueError, match="clip_high must be at least 0"):
        clipped_surrogate(policy, start, advantages, weights, clip_low=0.2, clip_high=-0.1)
    with pytest.raises(ValueError, match=r"'triton' does not run on cpu; available on cpu are .*'reference'"):
        clipped_surrogate(policy, start, advantages, weights, backend="triton", **clips)
    with pytest.raises(ValueError, match="kl_weight needs reference_logprobs"):
        clipped_surrogate(policy, start, advantages, weights, kl_weight=0.1, **clips)
    with pytest.raises(ValueError, match="kl_weight must be at least 0, got nan"):
        clipped_surrogate(
            policy, start, advantages, weights, reference_logprobs=reference, kl_weight=torch.nan, **clips
        )
