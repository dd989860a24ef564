"""What a plan consists of: calls of the fused kernel, as indices of rows and nodes."""

from dataclasses import dataclass, field

import torch

CACHED_BIAS = 2**23  # mask entries a plan may keep as floats between calls (32 MiB in fp32)


Rows = torch.Tensor | slice
"""Indices [N] int64, or consecutive ones: a slice, with which nothing is copied."""


@dataclass(frozen=True)
class Part:
    """A call on contiguous rows of q and contiguous nodes: a causal square, or a full rectangle."""

    rows: slice  # of q
    keys: slice  # nodes


@dataclass(frozen=True, eq=False)
class Context:
    """The ancestors of a trunk that lie outside trunks: a full rectangle over gathered keys."""

    rows: slice  # of q
    keys: torch.Tensor  # [C] int64 nodes


@dataclass(frozen=True, eq=False)
class Stack:
    """Causal squares of similar size in one call. Padding repeats a square's last node, after all others."""

    squares: int  # N
    rows: Rows  # [N * L] of q
    keys: Rows  # [N * L] nodes
    real: torch.Tensor | None  # [number of real ones] int64 among N * L; None: all


@dataclass(frozen=True, eq=False)
class Bucket:
    """Blocks stacked into one call."""

    blocks: int  # N
    queries: torch.Tensor  # [N * B] int64 rows of q
    keys: torch.Tensor  # [N * K] int64 nodes; padding repeats a node and is hidden
    hidden: torch.Tensor  # [N, 1, B, K] bool, True where the query does not see the key


@dataclass(frozen=True, eq=False)
class Plan:
    """Index arrays of one forest, shared by all layers.

    Squares, stacks and buckets hold every row once; rectangles and contexts are merged into them.
    """

    squares: tuple[Part, ...] = ()
    rectangles: tuple[Part, ...] = ()
    contexts: tuple[Context, ...] = ()
    stacks: tuple[Stack, ...] = ()
    buckets: tuple[Bucket, ...] = ()
    _biases: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict, repr=False)

    def bias(self, bucket: int, dtype: torch.dtype) -> torch.Tensor:
        """The mask of a bucket as [N, 1, B, K]: 0 where visible, -inf where hidden."""
        key = (bucket, dtype)
        if key in self._biases:
            return self._biases[key]
        hidden = self.buckets[bucket].hidden
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        if sum(one.numel() for one in self._biases.values()) + bias.numel() <= CACHED_BIAS:
            self._biases[key] = bias
        return bias
