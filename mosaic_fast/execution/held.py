"""A forward that is held: branches stand on its keys and values, and give their gradient back."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic_fast.policy.attention import KeysAndValues


class Held:
    """The keys and values of a forward as leaves, and the sum of the gradients that branches have for them.

    The forward's graph is kept until its last branch is done, then runs backward once, from its own loss and
    from these sums together: the chain rule through the whole tree, with every node forwarded once. Under
    activation checkpointing the graph is the layers' inputs, and each layer runs a second time in that one
    backward pass, as it would without branches.
    """

    def __init__(self, index: int, keys_and_values: KeysAndValues, loss: Tensor | None = None) -> None:
        self.index, self._loss = index, loss
        self._made = [x for pair in keys_and_values.values() for x in pair]
        self._leaves = [x.detach().requires_grad_(x.requires_grad) for x in self._made]
        self._sums: list[Tensor | None] = [None] * len(self._made)
        self.leaves: KeysAndValues = {
            layer: (self._leaves[2 * i], self._leaves[2 * i + 1]) for i, layer in enumerate(keys_and_values)
        }

    def collect(self) -> None:
        """Take over the gradient that a branch's backward pass has left, in fp32 or wider."""
        for index, leaf in enumerate(self._leaves):
            if leaf.grad is None:
                continue
            grad = leaf.grad.to(torch.promote_types(leaf.dtype, torch.float32))
            total = self._sums[index]
            self._sums[index] = grad if total is None else total.add_(grad)
            leaf.grad = None

    def backward(self) -> None:
        """Its own backward pass, after that of its last branch."""
        roots: list[Tensor] = []
        grads: list[Tensor | None] = []
        if self._loss is not None:
            roots.append(self._loss)
            grads.append(None)
        for made, total in zip(self._made, self._sums, strict=True):
            if total is not None:
                roots.append(made)
                grads.append(total.to(made.dtype))
        if roots:
            torch.autograd.backward(roots, grads)
