"""Random forests for all kernel tests: one place that knows which shapes hurt."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from mosaic_kernels import PackedForest, pack_forest

VOCAB = 7  # small, so that rollouts share prefixes by chance as well as by construction


@dataclass(frozen=True)
class Rollouts:
    sequences: list[list[int]]
    trained: list[list[bool]]

    def pack(self) -> PackedForest:
        return pack_forest(self.sequences, [np.array(mask, np.bool_) for mask in self.trained])


@st.composite
def rollouts(draw: st.DrawFn, max_rollouts: int = 8, max_length: int = 24, min_rollouts: int = 0) -> Rollouts:
    """Several trees in a pack; duplicates, strict prefixes, forks, one-token and empty rollouts; any masks.

    Shapes are drawn by hypothesis, token ids and mask bits by a generator with a drawn seed: long token
    lists would otherwise exhaust the draw budget without adding shapes.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = ["fresh", "fork", "fork", "duplicate", "prefix", "single", "empty"]
    sequences: list[list[int]] = []
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=min_rollouts, max_size=max_rollouts)):
        donor = sequences[int(rng.integers(len(sequences)))] if sequences else []
        tail = rng.integers(VOCAB, size=draw(st.integers(1, max_length))).tolist()
        if kind == "fork":
            cut = int(rng.integers(len(donor) + 1))
            sequences.append((donor[:cut] + tail)[: 2 * max_length])
        elif kind == "duplicate":
            sequences.append(list(donor))
        elif kind == "prefix":
            sequences.append(donor[: int(rng.integers(len(donor) + 1))])
        elif kind == "single":
            sequences.append(tail[:1])
        else:
            sequences.append([] if kind == "empty" else tail)
    share = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    trained = [[index > 0 and bool(rng.random() < share) for index in range(len(s))] for s in sequences]
    return Rollouts(sequences, trained)


def forests(
    max_rollouts: int = 8, max_length: int = 24, min_rollouts: int = 0
) -> st.SearchStrategy[PackedForest]:
    return rollouts(max_rollouts, max_length, min_rollouts).map(Rollouts.pack)


@dataclass(frozen=True)
class Heads:
    query_heads: int
    key_heads: int
    head_dim: int
    value_dim: int | None = None  # None: as head_dim
    sinks: bool = False

    def draw_qkv(
        self, num_nodes: int, seed: int, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v, each differentiable."""
        q, k, v, *_ = self.draw(num_nodes, seed, dtype)
        return q, k, v

    def draw(self, num_nodes: int, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """The same, and the sinks, where there are some."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [
            (num_nodes, self.query_heads, self.head_dim),
            (num_nodes, self.key_heads, self.head_dim),
            (num_nodes, self.key_heads, self.value_dim or self.head_dim),
            *([(self.query_heads,)] if self.sinks else []),
        ]
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [x.to(dtype).requires_grad_() for x in drawn]


heads = st.sampled_from(
    [
        Heads(1, 1, 8),
        Heads(4, 2, 5),
        Heads(3, 1, 16),
        Heads(2, 2, 1),
        Heads(6, 2, 7, value_dim=3),
        Heads(4, 2, 3, value_dim=5, sinks=True),
        Heads(3, 1, 8, sinks=True),
    ]
)
seeds = st.integers(0, 2**31 - 1)
