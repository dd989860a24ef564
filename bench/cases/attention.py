"""attention: one layer's tree attention, forward and backward, with 6 query and 2 key heads of 64.

    attention               1,500 shared tokens, 6 rollouts of 250, half of them forking halfway
    attention:many_short    300 shared tokens, 64 rollouts of 30
    attention:nothing_shared  5 rollouts of 500

    ours    tree_attention, the backend of this device
    flat    SDPA a rollout, causal, on its own copy of queries, keys and values (what a flat batch has)
    dense   SDPA over the tree's tokens under a dense mask
    gather  SDPA a run of queries over a gathered copy of its path's keys and values

ideal = visible pairs of the flat batch / visible pairs of the forest. Operations: 2 products forward and 5
backward, 2 x heads x head size x pairs each, visible pairs only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from contenders import gather_attention, gathered_runs
from measure import Result, compare
from torch import Tensor
from workloads import Workload, drawn, qwen3

from mosaic_kernels import PackedForest, tree_attention

FORMULA = "ideal = sum of rollouts' n (n + 1) / 2 / sum of nodes' depth"

HEADS, KEY_HEADS, SIZE = 6, 2, 64
_SHAPES: dict[str, tuple[int, int, int, bool]] = {
    "attention": (1_500, 6, 250, True),
    "attention:many_short": (300, 64, 30, False),
    "attention:nothing_shared": (0, 5, 500, False),
}
VARIANTS = DEFAULT = tuple(_SHAPES)
SECONDS = {"attention": 14}
QUICK = ("attention:many_short",)

TOLERANCE = 1e-4  # of the largest value, fp32 against fp64


def _workload(name: str) -> Workload:
    shared, rollouts, own, fork = _SHAPES[name]
    return drawn(shared, rollouts, own, fork_halfway=fork, model=qwen3(1, 128, 512))


def inputs(forest: PackedForest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of every node and the gradient of the output: [U, H, D]."""
    random = torch.Generator().manual_seed(0)
    shapes = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    q, k, v, grad = (torch.randn(forest.num_nodes, h, SIZE, generator=random) for h in shapes)
    return q, k, v, grad


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def implementations(forest: PackedForest) -> dict[str, Attention]:
    """Attention over the nodes, [U, H, D] each; `flat` is of rollout tokens, [T, H, D]."""
    end = torch.from_numpy(forest.subtree_end)
    node = torch.arange(forest.num_nodes)
    visible = (node[None, :] <= node[:, None]) & (node[:, None] < end[None, :])
    runs = gathered_runs(forest.subtree_end)
    lengths = np.diff(forest.cu_seqlens).tolist()

    def heads_first(attend: Attention) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)

        return run

    def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = heads_first(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        )
        split = (x.split(lengths) for x in (q, k, v))
        return torch.cat([one(*parts) for parts in zip(*split, strict=True)])

    return {
        "ours": lambda q, k, v: tree_attention(q, k, v, end),
        "flat": flat,
        "dense": heads_first(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        ),
        "gather": heads_first(lambda q, k, v: gather_attention(q, k, v, runs)),
    }


def pairs(forest: PackedForest) -> tuple[int, int]:
    """Visible pairs of the flat batch and of the forest."""
    seen = forest.positions + 1
    return int(seen[forest.node_index].sum()), int(seen.sum())


def ideal(forest: PackedForest) -> float:
    flat, tree = pairs(forest)
    return flat / tree


def check(name: str, quick: bool) -> None:
    """Output and gradients of every contender against the dense reference in fp64."""
    forest = _workload(name).forest
    *parts, grad = inputs(forest)
    exact = [x.double().requires_grad_() for x in parts]
    q, k, v = exact
    out = tree_attention(q, k, v, torch.from_numpy(forest.subtree_end), backend="reference")
    expected = [out, *torch.autograd.grad(out, exact, grad.double())]
    node = torch.from_numpy(forest.node_index)
    share = torch.from_numpy(1.0 / np.bincount(forest.node_index)).float()[node]  # of a node, to each rollout
    for one, attention in implementations(forest).items():
        leaves = [x.clone().requires_grad_() for x in parts]
        if one == "flat":
            copies = [x[node] for x in leaves]
            out = attention(*copies)
            found = [out, *torch.autograd.grad(out, leaves, grad[node] * share[:, None, None])]
            wanted = [expected[0][node], *expected[1:]]
        else:
            out = attention(*leaves)
            found, wanted = [out, *torch.autograd.grad(out, leaves, grad)], expected
        for what, a, b in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
            error = float(((a - b).abs().max() / b.abs().max()).detach())
            assert error < TOLERANCE, f"{one}: {what} is off by {error:.1e}"


def run(name: str, quick: bool) -> Result:
    forest = _workload(name).forest
    *parts, grad = inputs(forest)
    node = torch.from_numpy(forest.node_index)
    leaves = [x.requires_grad_() for x in parts]
    flat_leaves = [x.detach()[node].contiguous().requires_grad_() for x in parts]
    flat_grad = grad[node].contiguous()

    def both(attention: Attention, its: list[Tensor], its_grad: Tensor) -> Callable[[], None]:
        def work() -> None:
            torch.autograd.grad(attention(*its), its, its_grad)

        return work

    contenders = {
        one: both(attention, flat_leaves, flat_grad) if one == "flat" else both(attention, leaves, grad)
        for one, attention in implementations(forest).items()
    }
    flat, tree = pairs(forest)
    operations = 7 * 2e-9 * HEADS * SIZE
    return compare(
        contenders,
        repeats=5,
        budget_s=4.0,
        ideal=ideal(forest),
        extra={
            "raw_tokens": forest.num_tokens,
            "unique_tokens": forest.num_nodes,
            "gflop": operations * tree,
            "flat_gflop": operations * flat,
        },
        peaks=tuple(contenders),
    )
