"""Sums over rows that occur several times, always in the same order: the same call gives the same bits.

A CPU adds serially. On a GPU index_add, and index_select in its backward pass, add by atomics in whatever
order; indexing and index_put sort the rows first.
"""

from __future__ import annotations

import torch


def pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:  # [N, ...], [M] int64 -> [M, ...]
    """values[index], differentiable."""
    return values[index] if _sorts(values) else values.index_select(0, index)


def add_up(values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:  # [M], [M] -> [size]
    """The sum of the values of each index in [0, size), differentiable."""
    zeros = values.new_zeros(size)
    if _sorts(values):
        return zeros.index_put((index,), values, accumulate=True)
    return zeros.index_add(0, index, values)


def _sorts(values: torch.Tensor) -> bool:
    return values.is_cuda
