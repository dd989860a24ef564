"""RMSNorm and rotary embedding as single operations: autograd of the formulas is the oracle, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mosaic_fast.policy.elementwise as elementwise_module
import mosaic_fast.policy.layer as layer_module
from mosaic_fast.policy import Policy
from mosaic_fast.policy.elementwise import rms_norm, rotate
from tests.policy.policy_helpers import decoder, example_rollouts, tiny_model


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_same(got: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values, and gradients of the leaves for an incoming gradient that is not contiguous."""
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    incoming = drawn(*reversed(got.shape)).permute(*reversed(range(got.ndim)))
    for one, other in zip(
        torch.autograd.grad(got, leaves, incoming),
        torch.autograd.grad(expected, leaves, incoming),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three rows at a time, the last time fewer."""
    monkeypatch.setattr(elementwise_module, "BLOCK_NUMBERS", 20)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(1, 5, 7), (5, 7), (1, 4, 3, 6), (1, 7, 2, 5), (1, 1, 1), (1, 0, 4)])
@pytest.mark.parametrize("frozen", ["", "x", "weight"])
def test_rms_norm(shape: tuple[int, ...], frozen: str) -> None:
    x, weight = (
        drawn(*shape).requires_grad_(frozen != "x"),
        drawn(shape[-1]).requires_grad_(frozen != "weight"),
    )
    expected = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
    leaves = [leaf for leaf in (x, weight) if leaf.requires_grad]
    assert_same(rms_norm(x, weight, 1e-3), expected, leaves)


def test_heads_beside_others_are_not_copied() -> None:
    """The heads of queries are a part of each row of a joined projection; the norm keeps that view."""
    row = drawn(1, 6, 20).requires_grad_()
    heads, weight = row[..., 2:14].unflatten(-1, (3, 4)), drawn(4).requires_grad_()
    expected = weight * heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-3)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        got = rms_norm(heads, weight, 1e-3)
    assert any(one.data_ptr() == heads.data_ptr() and one.shape == (6, 3, 4) for one in kept)
    assert_same(got, expected, [row, weight])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rotated", [2, 6, 8])
def test_rotate(rotated: int) -> None:
    """A part of each head, or all of it; cosines of both halves may differ."""
    x = drawn(1, 5, 3, 8).requires_grad_()
    cos, sin = drawn(1, 5, rotated), drawn(1, 5, rotated).cos()
    first, second = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
    turned = torch.cat([-second, first], -1)
    expected = torch.cat(
        [x[..., :rotated] * cos.unsqueeze(2) + turned * sin.unsqueeze(2), x[..., rotated:]], -1
    )
    assert_same(rotate(x, cos, sin), expected, [x])


def test_stock_norms_alone_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hooked norm, and one with a forward of its own, are called as they are; so are those of bf16."""
    calls: list[Tensor] = []

    def counted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        calls.append(x)
        return rms_norm(x, weight, eps)

    monkeypatch.setattr(layer_module, "rms_norm", counted)
    model, forest = tiny_model("qwen3", torch.float32), example_rollouts().pack()
    norms = 2 * 4 + 1  # layers with two norms and two of heads, and the last one
    policy = Policy(model)  # which proves itself first
    calls.clear()
    policy.logprobs(forest)
    assert len(calls) == norms
    final = decoder(model).norm
    final.forward = lambda x: type(final).forward(final, x)
    decoder(model).layers[0].mlp.register_forward_hook(lambda *_: None)  # the whole layer is called
    calls.clear()
    Policy(model).logprobs(forest)
    assert len(calls) == 4
    policy = Policy(tiny_model("qwen3", torch.bfloat16))
    calls.clear()
    policy.logprobs(forest)
    assert not calls
