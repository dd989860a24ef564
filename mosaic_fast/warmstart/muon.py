"""Muon: momentum whose every update is made a nearly orthogonal matrix (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan's Newton-Schulz iteration
_ITERATIONS = 5


class Muon:
    """Updates weight matrices; matrices of one shape are orthogonalised together."""

    def __init__(
        self, matrices: Iterable[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        self._groups = list(by_shape.values())
        self._velocity = [torch.zeros(len(group), *group[0].shape) for group in self._groups]
        self._momentum, self._weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients in place."""
        for group, velocity in zip(self._groups, self._velocity, strict=True):
            gradients = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in group])
            velocity.lerp_(gradients, 1.0 - self._momentum)
            updates = orthogonalise(torch.lerp(gradients, velocity, self._momentum))
            rows, columns = group[0].shape
            scale = max(1.0, rows / columns) ** 0.5
            for parameter, update in zip(group, updates, strict=True):
                parameter.mul_(1.0 - lr * self._weight_decay).add_(update, alpha=-lr * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values end near 1.

    matrices: [K, M, N] fp32. Returns [K, M, N].
    """
    a, b, c = _QUINTIC
    transpose = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if transpose else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transpose else x
