"""What tests of tree_attention share: forests of the shipped block sizes, and errors against the oracle."""

from collections.abc import Callable

import numpy as np
import torch

from mosaic_kernels import PackedForest, pack_forest
from mosaic_kernels.oracle import attention_of_rollouts, errors_of

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def errors(
    forest: PackedForest,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attention: Attention,
    seed: int,
    window: int | None,
    scale: float | None,
) -> list[float]:
    """Relative errors of the output and of the gradients of q, k and v against the fp64 oracle.

    Each rollout token weights its output by itself, so a shared node collects the gradients of all.
    """
    nodes = torch.from_numpy(forest.node_index)
    exact = q, k, v = [x.detach().double().requires_grad_() for x in qkv]
    expected = attention_of_rollouts(q, k, v, forest, window=window, scale=scale)
    return errors_of([attention(*qkv)[nodes]], qkv, [expected], exact, seed)


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
