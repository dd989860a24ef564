"""On a GPU the same update gives the same bits: nothing is added up by atomics in whatever order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mosaic_fast.learner.learner import Learner, Reference
from mosaic_fast.policy import Policy
from mosaic_kernels import fixed_order
from mosaic_kernels.attention.flash import build_gather
from mosaic_kernels.fixed_order import add_up, pick
from tests.learner.flat_oracle import forked_case
from tests.learner.learner_configs import config_of, moved
from tests.policy.policy_helpers import tiny_model

ATOMIC = ("index_add", "scatter_add", "scatter_reduce", "index_reduce", "cumsum")


class Repeated(TorchDispatchMode):
    """Notes each operation that adds by atomics on a GPU, at an index that occurs more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = str(func)
        if any(one in name for one in ATOMIC):
            index = args[2] if "cumsum" not in name else None
            floats = isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
            if floats and (not isinstance(index, torch.Tensor) or len(index.unique()) < index.numel()):
                self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes the way of a GPU."""
    monkeypatch.setattr(fixed_order, "_sorts", lambda values: True)


@pytest.mark.usefixtures("sorting")
@pytest.mark.parametrize("name", ["gspo", "dpo_norm"])
def test_an_update_adds_at_no_repeated_index(name: str) -> None:
    model = tiny_model("qwen3")
    policy = Policy(model, attention="reference")
    learner = Learner(policy, Reference(Policy(moved(model), attention="reference")), config_of(name))
    with Repeated() as repeated:
        learner.update(forked_case().batch(), 0)
    assert repeated.found == []


def test_without_the_way_of_a_gpu_it_would() -> None:
    model = tiny_model("qwen3")
    learner = Learner(Policy(model, attention="reference"), None, config_of("grpo", penalised=False))
    with Repeated() as repeated:
        learner.update(forked_case().batch(), 0)
    assert repeated.found


def test_both_ways_give_the_same(sorting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(5, (40,), generator=generator)
    values, rows = (torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(2))
    results = []
    for sorts in (True, False):
        monkeypatch.setattr(fixed_order, "_sorts", lambda values, sorts=sorts: sorts)
        leaf, other = values.clone().requires_grad_(), rows[:5].clone().requires_grad_()
        total, picked = add_up(leaf, index, 5), pick(other, index)
        results.append(
            [total, picked, *torch.autograd.grad((total**2).sum() + (picked**3).sum(), (leaf, other))]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("sorting")
def test_gathered_keys_get_their_gradients_in_a_fixed_order() -> None:
    """Those of flash-attn's backend, which copies a shared key for every branch."""
    forest = forked_case().batch().forest
    gather = build_gather(forest.subtree_end, np.arange(forest.num_nodes), torch.device("cpu"))
    keys = torch.randn(forest.num_nodes, 2, 4, requires_grad=True)
    with Repeated() as repeated:
        pick(keys, gather.keys).sum().backward()
    assert repeated.found == []
