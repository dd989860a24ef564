"""Queries, keys and values by one product: the modules themselves are the oracle, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import mosaic_fast.policy.layer as layer_module
from mosaic_fast.policy import Policy
from mosaic_fast.policy.layout import is_plain_linear
from mosaic_fast.policy.projections import can_be_joined, joined
from tests.policy.policy_helpers import decoder, example_rollouts, tiny_model


def linears(bias: bool) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(5, features, bias=bias, dtype=torch.float64) for features in (6, 2, 2)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [(), (1,), (0, 1, 2), "x"])
def test_joined(bias: bool, frozen: tuple[int, ...] | str) -> None:
    """Of three results one goes unused; modules, or the input, may need no gradient."""
    modules = linears(bias)
    for index in frozen if isinstance(frozen, tuple) else ():
        modules[index].requires_grad_(False)
    x = torch.randn(1, 7, 5, dtype=torch.float64, requires_grad=frozen != "x")
    leaves = [p for one in modules for p in one.parameters() if p.requires_grad]
    leaves += [x] if x.requires_grad else []

    def gradients(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        loss = parts[0].square().sum() + (parts[2].transpose(1, 2) @ parts[2]).sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    got, expected = joined(x, modules), tuple(one(x) for one in modules)
    for one, other in zip((*got, *gradients(got)), (*expected, *gradients(expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_is_more_than_a_matrix_is_not_joined() -> None:
    x = torch.randn(1, 3, 5, dtype=torch.float64)
    assert can_be_joined(x, linears(True))
    assert not can_be_joined(x, [*linears(True)[:2], linears(False)[2]])
    assert not can_be_joined(x.float(), linears(True))
    assert not can_be_joined(x.bfloat16(), [one.bfloat16() for one in linears(False)])
    hooked = linears(False)
    hooked[1].register_forward_hook(lambda *_: None)
    assert not is_plain_linear(hooked[1])
    assert not can_be_joined(x, hooked)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_layers_but_the_last_join_their_projections(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one asks for queries on other rows than keys."""
    model = tiny_model(family)
    keys: list[nn.Module] = []

    def counted(x: Tensor, modules: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
        keys.append(modules[1])
        return joined(x, modules)

    monkeypatch.setattr(layer_module, "joined", counted)
    policy = Policy(model)  # which proves itself first
    keys.clear()
    policy.logprobs(example_rollouts().pack())
    assert keys == [layer.self_attn.k_proj for layer in decoder(model).layers[:-1]]
