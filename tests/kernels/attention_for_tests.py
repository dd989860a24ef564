"""What tests of tree_attention share: forests of the shipped block sizes, and errors against the oracle."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch

from mosaic_kernels import PackedForest, pack_forest
from mosaic_kernels.magnitudes import attention_magnitudes
from mosaic_kernels.oracle import attention_of_rollouts
from mosaic_kernels.rounding import Magnitude, weighting, worst_of
from tests.kernels.criterion import assert_right

Attention = Callable[..., torch.Tensor]


class Bends(TypedDict, total=False):
    """What a family of models adds to plain attention, beside sinks."""

    chunk: int | None
    softcap: float | None


def check(
    forest: PackedForest,
    qkv: Sequence[torch.Tensor],  # and sinks, where there are some
    attention: Attention,  # of qkv, and sinks: one row a node, or a query
    seed: int,
    window: int | None = None,
    scale: float | None = None,
    queries: np.ndarray | None = None,  # [Uq], of nodes; None: all
    bends: Bends | None = None,
) -> None:
    """Output and gradients of q, k, v and sinks are the fp64 oracle's, as far as rounding leaves them.

    Each rollout token weights its output by itself, so a shared node collects the gradients of all.
    """
    nodes, queries = forest.node_index, np.arange(forest.num_nodes) if queries is None else queries
    row_of_node = np.full(forest.num_nodes, -1)
    row_of_node[queries] = np.arange(len(queries))
    asked = np.flatnonzero(row_of_node[nodes] >= 0)  # the rollout tokens that are
    rows = torch.from_numpy(row_of_node[nodes[asked]])
    exact = q, k, v, *rest = [x.detach().cpu().double().requires_grad_() for x in qkv]
    sinks, bends = rest[0] if rest else None, bends or Bends()
    expected = attention_of_rollouts(q, k, v, forest, window=window, scale=scale, sinks=sinks, **bends)
    (weight,) = weighting([expected], seed)
    weight[row_of_node[nodes] < 0] = 0
    out, *gradients = attention_magnitudes(
        q, k, v, forest, weight, window=window, scale=scale, dtype=qkv[0].dtype, sinks=sinks, **bends
    )
    magnitudes = [Magnitude(out.sums[asked], out.casts[asked]), *gradients[: len(qkv)]]
    terms = max(q.shape[2], v.shape[2], forest.num_tokens * q.shape[1] // k.shape[1])
    found = attention(*qkv)
    found = found[rows.to(found.device)]
    off = worst_of([found], qkv, [expected[asked]], exact, [weight[asked]], magnitudes, terms)
    assert_right(("out", "dq", "dk", "dv", "dsinks")[: len(off)], off)


def big_forest(kind: str) -> PackedForest:
    """Forests that reach the shipped block and trunk sizes."""
    rng = np.random.default_rng(3)

    def draw(n: int) -> list[int]:
        return rng.integers(1000, size=n).tolist()

    trunk, step = draw(170), draw(60)
    return pack_forest(
        {
            "trunk, fork, long branches": [
                trunk + step + draw(140),
                trunk + step + draw(30),
                trunk + draw(20),
            ],
            "short prompt, long branches": [step + draw(150), step + draw(131), step[:10] + draw(9), draw(1)],
            "nothing shared": [draw(129), draw(129), draw(40)],
            "similar branches": [trunk + draw(n) for n in (60, 57, 52, 31)] + [draw(58), draw(59)],
            "many short": [draw(int(rng.integers(1, 9))) for _ in range(150)],
        }[kind]
    )


BIG = [
    "trunk, fork, long branches",
    "short prompt, long branches",
    "nothing shared",
    "similar branches",
    "many short",
]
