"""The surrogate's kernel against one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels import clipped_surrogate
from mosaic_kernels.magnitudes import surrogate_magnitudes
from mosaic_kernels.oracle import surrogate_of_tokens
from mosaic_kernels.rounding import gradients_of, weighting, worst_of
from mosaic_kernels.selfcheck import KernelMismatch, run_check
from mosaic_kernels.surrogate import triton as surrogate_triton
from tests.kernels.criterion import assert_right
from tests.kernels.strategies import seeds
from tests.kernels.triton.machine import machine, on_machine


def draw(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """policy, start, advantages, weights, reference; tokens without weight hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    policy, start, advantages, weights, reference = torch.randn(5, tokens, generator=generator)
    weights = torch.where(weights < -0.5, 0.0, weights)
    advantages = torch.where(advantages.abs() < 0.2, 0.0, advantages)
    policy, reference = start + 0.5 * policy, start + 0.5 * reference
    dropped = weights == 0
    values = [torch.where(dropped, torch.nan, x) for x in (policy, start, advantages, reference)]
    return [x.to(dtype) for x in (*values[:3], weights, values[3])]


@settings(max_examples=machine().examples)
@given(
    tokens=st.sampled_from([0, 1, 5, 1023, 1024, 2100]),
    seed=seeds,
    clips=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, 3.0)]),
    kl_weight=st.sampled_from([0.0, 0.04, 1.0]),
    dtype=st.sampled_from(machine().dtypes),
)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_one_token_at_a_time(
    tokens: int, seed: int, clips: tuple[float, float], kl_weight: float, dtype: torch.dtype
) -> None:
    inputs = draw(tokens, seed, dtype)
    options = {"clip_low": clips[0], "clip_high": clips[1], "kl_weight": kl_weight}

    policy, *others = on_machine(*inputs)
    loss = clipped_surrogate(
        policy.requires_grad_(), *others[:3], reference_logprobs=others[3], backend="triton", **options
    )
    exact, start, advantages, weights, reference = (x.detach().double() for x in inputs)
    expected = surrogate_of_tokens(
        exact.requires_grad_(), *(x.tolist() for x in (start, advantages, weights, reference)), **options
    )
    drawn = weighting([expected], seed)
    magnitudes = surrogate_magnitudes(
        exact, start, advantages, weights, reference, drawn[0], dtype=dtype, **options
    )
    off = worst_of([loss], [policy], [expected], [exact], drawn, magnitudes, terms=1)
    assert_right(("loss", "dpolicy"), off)
    (gradient,) = gradients_of(
        [clipped_surrogate(policy, *others[:3], reference_logprobs=others[3], backend="triton", **options)],
        [policy],
        drawn,
    )
    dropped = inputs[3] == 0
    assert not loss.cpu()[dropped].any()
    assert not gradient.cpu()[dropped].any()


def test_the_kl_of_nearly_equal_policies_keeps_its_digits() -> None:
    """From 1e-4 to 1, across the switch from the series to exp: exp(d) - d - 1 would be rounding only."""
    difference = torch.logspace(-4, 0, 200, dtype=torch.float64)
    for d in (difference, -difference):
        d = d.float()
        policy = on_machine(torch.zeros(200))[0].requires_grad_()
        zeros, ones = on_machine(torch.zeros(200), torch.ones(200))
        loss = clipped_surrogate(
            policy, zeros, zeros, ones, reference_logprobs=on_machine(d)[0],
            clip_low=0.2, clip_high=0.2, kl_weight=1.0, backend="triton",
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss.sum(), policy)
        wide = d.double()
        exact = torch.expm1(wide) - wide
        assert (loss.detach().cpu().double() / exact - 1).abs().max() < 2e-6
        assert (grad.cpu().double() / -torch.expm1(wide) - 1).abs().max() < 2e-6


def test_a_ratio_that_overflows_is_clipped_and_a_nan_that_counts_shows() -> None:
    policy = on_machine(torch.tensor([0.0, 0.0, 0.0, torch.nan]))[0].requires_grad_()
    start, advantages, weights = on_machine(
        torch.full((4,), -200.0), torch.tensor([1.0, 0.0, torch.nan, 1.0]), torch.ones(4)
    )
    loss = clipped_surrogate(
        policy, start, advantages, weights, clip_low=0.2, clip_high=0.25, backend="triton"
    )
    (grad,) = torch.autograd.grad(loss.sum(), policy)
    assert loss[:2].tolist() == [-1.25, 0.0]
    assert not grad[:2].any()
    assert loss.isnan().tolist() == grad.isnan().tolist() == [False, False, True, True]


def test_strided_inputs() -> None:
    inputs = on_machine(*draw(300, 0))
    clips = {"clip_low": 0.2, "clip_high": 0.2, "kl_weight": 0.1, "backend": "triton"}
    strided = [x.repeat_interleave(3)[::3] for x in inputs]
    a, b = (clipped_surrogate(*x[:4], reference_logprobs=x[4], **clips) for x in (inputs, strided))
    assert torch.equal(a, b)


def test_fp64_is_refused_by_name() -> None:
    values = on_machine(*(x.double() for x in draw(5, 0)[:4]))
    with pytest.raises(ValueError, match="for fp64 use backend='reference'"):
        clipped_surrogate(*values, clip_low=0.2, clip_high=0.2, backend="triton")


@pytest.mark.parametrize("with_kl", [True, False])
def test_the_self_check_passes_and_sees_a_kernel_that_is_off(
    with_kl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, exact, variant = machine().device, surrogate_triton._Surrogate, (torch.float32, with_kl)
    for dtype in machine().dtypes:
        found = surrogate_triton.deviations(device, (dtype, with_kl))
        assert set(found) == {"loss", "dpolicy"}
        assert all(x.error <= x.limit for x in found.values())

    class Off:
        @staticmethod
        def apply(*args: object) -> torch.Tensor:
            return exact.apply(*args) * (1 + 1e-4)

    monkeypatch.setattr(surrogate_triton, "_Surrogate", Off)
    with pytest.raises(KernelMismatch, match=r"clipped_surrogate: .*: loss, dpolicy off"):
        run_check("clipped_surrogate", device, variant, surrogate_triton.deviations)
