"""attention: one layer's tree attention, forward and backward.

                              CPU: 6 query, 2 key heads of 64     CUDA: 32 query, 8 key heads of 128
    attention                 1,500 shared, 6 rollouts of 250     4,096 shared, 8 rollouts of 1,024
    attention:many_short      300 shared, 64 rollouts of 30       2,048 shared, 64 rollouts of 128
    attention:nothing_shared  5 rollouts of 500                   4 rollouts of 4,096

Of the first half of the rollouts fork halfway.

    ours    tree_attention, the backend of this device
    flat    SDPA a rollout, causal, on its own copy of queries, keys and values (what a flat batch has)
    dense   SDPA over the tree's tokens under a dense mask
    gather  SDPA a run of queries over a gathered copy of its path's keys and values
    varlen  CUDA: the same by PyTorch's varlen_attn, one call for all runs
    flash   CUDA: the same by flash-attn's varlen function
    flex    CUDA: FlexAttention, compiled, with the tree's block mask

ideal = visible pairs of the flat batch / visible pairs of the forest. Operations: 2 products forward and 5
backward, 2 x heads x head size x pairs each, visible pairs only: who computes more is not credited for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from agreement import Expected, Missing, missing_of
from contenders import gather_attention, gather_of, gathered_runs, varlen_attention
from device import Place
from measure import Result, compare
from peer import package_missing
from torch import Tensor
from workloads import drawn_rollouts

from mosaic_kernels import PackedForest, pack_forest, tree_attention

FORMULA = "ideal = sum of rollouts' n (n + 1) / 2 / sum of nodes' depth"

# Heads of queries, of keys, and their size.
HEADS: tuple[int, int, int] = (6, 2, 64)
REAL_HEADS: tuple[int, int, int] = (32, 8, 128)
SHAPES = {
    "attention": (1_500, 6, 250, True),
    "attention:many_short": (300, 64, 30, False),
    "attention:nothing_shared": (0, 5, 500, False),
}
REAL_SHAPES = {
    "attention": (4_096, 8, 1_024, True),
    "attention:many_short": (2_048, 64, 128, False),
    "attention:nothing_shared": (0, 4, 4_096, False),
}
"""Shared tokens, rollouts, own tokens, whether half of them fork halfway."""
VARIANTS = DEFAULT = tuple(SHAPES)
SECONDS = {"attention": 14}
QUICK = ("attention:many_short",)
ON_CPU = False

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def forest_of(name: str, place: Place) -> PackedForest:
    shared, rollouts, own, fork = (REAL_SHAPES if place.real else SHAPES)[name]
    return pack_forest(*drawn_rollouts(512, shared, rollouts, own, fork_halfway=fork))


def inputs(forest: PackedForest, place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of every node and the gradient of the output: [U, H, D]."""
    queries, keys, size = REAL_HEADS if place.real else HEADS
    q, k, v, grad = (
        place.randn(forest.num_nodes, heads, size, seed=seed)
        for seed, heads in enumerate((queries, keys, keys, queries))
    )
    return q, k, v, grad


def flat_attention(forest: PackedForest) -> Attention:
    """Attention of the flat batch: queries, keys and values of all T rollout tokens, [T, H, D]."""
    lengths = np.diff(forest.cu_seqlens).tolist()
    one = _heads_first(partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True))

    def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([one(*x) for x in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)])

    return flat


def implementations(forest: PackedForest, place: Place) -> tuple[dict[str, Attention], Missing]:
    """Attention over the nodes, [U, H, D] each, but `flat`; and why the others are not there."""
    end = place.tensor(forest.subtree_end)
    node = torch.arange(forest.num_nodes, device=place.device)
    visible = (node[None, :] <= node[:, None]) & (node[:, None] < end[None, :])
    runs = gathered_runs(forest.subtree_end, place.device)
    found: dict[str, Attention] = {
        "ours": lambda q, k, v: tree_attention(q, k, v, end),
        "flat": flat_attention(forest),
        "dense": _heads_first(partial(F.scaled_dot_product_attention, attn_mask=visible, enable_gqa=True)),
        "gather": _heads_first(lambda q, k, v: gather_attention(q, k, v, runs)),
    }
    if not place.real:
        return found, {}
    gather = gather_of(forest.subtree_end, place.device)
    found["varlen"] = lambda q, k, v: varlen_attention(q, k, v, gather)
    found["flash"] = lambda q, k, v: tree_attention(q, k, v, end, backend="flash")
    found["flex"] = lambda q, k, v: tree_attention(q, k, v, end, backend="flex")
    missing = {one: why for one in found if (why := package_missing(one))}
    return {one: run for one, run in found.items() if one not in missing}, missing


def _heads_first(attend: Attention) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)

    return run


def pairs(forest: PackedForest) -> tuple[int, int]:
    """Visible pairs of the flat batch and of the forest."""
    seen = forest.positions + 1
    return int(seen[forest.node_index].sum()), int(seen.sum())


def ideal(forest: PackedForest) -> float:
    flat, tree = pairs(forest)
    return flat / tree


def exact_results(forest: PackedForest, place: Place) -> dict[str, Tensor]:
    """Output and gradients of the nodes in fp64, each rollout alone. fp64.

    A node's output is the same in every rollout; its gradients are summed over them, and each rollout has its
    share of the output's gradient.
    """
    q, k, v, grad = (x.double() for x in inputs(forest, place))
    grad = grad * _shares(forest, place).double()
    attend = _heads_first(partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True))
    found = [torch.zeros_like(x) for x in (grad, q, k, v)]
    paths = [place.tensor(x) for x in np.split(forest.node_index, forest.cu_seqlens[1:-1])]
    group = q.shape[1] // k.shape[1]
    for head in range(k.shape[1]):  # one at a time: scores in fp64 are large
        of_queries, of_keys = slice(head * group, (head + 1) * group), slice(head, head + 1)
        for path in paths:
            leaves = [
                x[path, heads].requires_grad_() for x, heads in ((q, of_queries), (k, of_keys), (v, of_keys))
            ]
            out = attend(*leaves)
            found[0][path, of_queries] = out.detach()
            gradients = torch.autograd.grad(out, leaves, grad[path, of_queries])
            for total, one, heads in zip(found[1:], gradients, (of_queries, of_keys, of_keys), strict=True):
                total[path, heads] += one  # a path has each node once
    return dict(zip(_NAMES, found, strict=True))


_NAMES = ("output", "dq", "dk", "dv")


def _shares(forest: PackedForest, place: Place) -> Tensor:  # [U, 1, 1] fp32
    """1 / the number of rollouts through a node."""
    return place.tensor(1.0 / np.bincount(forest.node_index)).float()[:, None, None]


def results(one: str, attention: Attention, forest: PackedForest, place: Place) -> dict[str, Tensor]:
    """Output and gradients of the nodes by an implementation; `flat`'s output is that of any rollout."""
    *parts, grad = inputs(forest, place)
    leaves = [x.requires_grad_() for x in parts]
    if one != "flat":
        out = attention(*leaves)
        return dict(zip(_NAMES, (out, *torch.autograd.grad(out, leaves, grad)), strict=True))
    node = place.tensor(forest.node_index)
    out = attention(*(x[node] for x in leaves))
    share = _shares(forest, place).to(place.dtype)
    found = torch.autograd.grad(out, leaves, grad[node] * share[node])
    of_nodes = torch.empty_like(grad).index_copy(0, node, out.detach())
    return dict(zip(_NAMES, (of_nodes, *found), strict=True))


def check(name: str, quick: bool, place: Place) -> Missing:
    """Output and gradients of every contender against each rollout alone in fp64."""
    forest = forest_of(name, place)
    contenders, missing = implementations(forest, place)
    plain = None
    if place.dtype != torch.float32:
        plain = results("flat", contenders["flat"], forest, place)
    expected = Expected(exact_results(forest, place), plain)
    return missing | missing_of(
        contenders,
        lambda one: expected.check(one, results(one, contenders[one], forest, place)),
        trusted=() if plain is None else ("flat",),
    )


def run(name: str, quick: bool, place: Place, missing: Missing) -> Result:
    forest = forest_of(name, place)
    *parts, grad = inputs(forest, place)
    node = place.tensor(forest.node_index)
    leaves = [x.requires_grad_() for x in parts]
    flat_leaves = [x.detach()[node].contiguous().requires_grad_() for x in parts]
    flat_grad = grad[node].contiguous()

    def both(attention: Attention, its: list[Tensor], its_grad: Tensor) -> Callable[[], None]:
        def work() -> None:
            torch.autograd.grad(attention(*its), its, its_grad)

        return work

    contenders = {
        one: both(attention, flat_leaves, flat_grad) if one == "flat" else both(attention, leaves, grad)
        for one, attention in implementations(forest, place)[0].items()
        if one not in missing
    }
    flat, tree = pairs(forest)
    heads, _, size = REAL_HEADS if place.real else HEADS
    operations = 7 * 2e-9 * heads * size
    return compare(
        contenders,
        repeats=20 if place.real else 5,
        budget_s=4.0,
        ideal=ideal(forest),
        extra={
            "raw_tokens": forest.num_tokens,
            "unique_tokens": forest.num_nodes,
            "gflop": operations * tree,
            "flat_gflop": operations * flat,
        },
        peaks=tuple(contenders),
        not_run=missing,
        place=place,
    )
