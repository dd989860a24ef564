"""The gated MLP in blocks: autograd of its formula is the oracle, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import mosaic_fast.policy.layer as layer_module
import mosaic_fast.policy.projections as mlp_module
from mosaic_fast.policy import Policy
from mosaic_fast.policy.layout import mlp_weights
from mosaic_fast.policy.projections import gated_mlp, rows_a_block
from tests.policy.policy_helpers import decoder, example_rollouts, tiny_model

LEAVES = ("x", "gate", "up", "down")


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_module, "BLOCK_NUMBERS", 12)
    monkeypatch.setattr(mlp_module, "FEWEST_ROWS", 2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 9])
@pytest.mark.parametrize("frozen", ["", *LEAVES])
def test_gated_mlp(rows: int, frozen: str) -> None:
    """With I = 4, blocks have 3 rows or 2 at the end; one leaf at a time needs no gradient."""
    leaves = dict(zip(LEAVES, (drawn(1, rows, 5), drawn(4, 5), drawn(5, 4).T, drawn(5, 4)), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    x, gate, up, down = leaves.values()
    got, expected = gated_mlp(x, gate, up, down), (silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(gated_mlp(x, gate, up, down), got, rtol=0.0, atol=0.0)
    incoming = drawn(5, rows, 1).permute(2, 1, 0)
    wanted = [leaf for name, leaf in leaves.items() if name != frozen]
    for one, other in zip(
        torch.autograd.grad(got, wanted, incoming, retain_graph=True),
        torch.autograd.grad(expected, wanted, incoming),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(got, wanted, incoming)  # nothing that was kept has been overwritten
    anew = torch.autograd.grad(gated_mlp(*leaves.values()), wanted, incoming)
    for one, other in zip(again, anew, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def test_blocks_are_equal_and_large_enough() -> None:
    assert rows_a_block(8192, 768) == 1171  # 7 blocks of at most 1,365 rows
    assert rows_a_block(1365, 768) == 1365
    assert rows_a_block(1366, 768) == 683
    assert rows_a_block(2000, 2**20) == 500  # 512 rows, however wide


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "llama"])
def test_stock_mlps_alone_are_run_in_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced forward, another activation, a biased projection and bf16 go through the module."""
    calls: list[Tensor] = []

    def counted(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        calls.append(x)
        return gated_mlp(x, gate, up, down)

    monkeypatch.setattr(layer_module, "gated_mlp", counted)
    model, forest = tiny_model(family, torch.float32), example_rollouts().pack()
    layers = decoder(model).layers
    policy = Policy(model)  # which proves itself first
    calls.clear()
    policy.logprobs(forest)
    assert len(calls) == len(layers)
    mlp = layers[0].mlp
    replaced = type(mlp).forward
    mlp.forward = lambda x: replaced(mlp, x)
    assert mlp_weights(model, mlp) is None
    del mlp.forward
    name = "act_fn" if hasattr(mlp, "act_fn") else "activation_fn"
    before = getattr(mlp, name)
    setattr(mlp, name, torch.nn.GELU())
    assert mlp_weights(model, mlp) is None
    setattr(mlp, name, before)
    assert mlp_weights(model, mlp) is not None
    mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(len(mlp.down_proj.weight)))
    assert mlp_weights(model, mlp) is None
    policy = Policy(tiny_model(family, torch.bfloat16))
    calls.clear()
    policy.logprobs(forest)
    assert not calls


@pytest.mark.usefixtures("small_blocks")
def test_an_mlp_keeps_half_of_what_autograd_keeps() -> None:
    """Two results of the first products a token, where autograd keeps the activation and its product too."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x, gate, up, down = drawn(9, 5).requires_grad_(), drawn(4, 5), drawn(4, 5), drawn(5, 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gated_mlp(x, gate, up, down)
    assert sum(one.shape == (9, 4) for one in saved) == 2
