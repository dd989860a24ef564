"""The two ways to accumulate the gradient of a loss over the forwards of a schedule, both exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mosaic_fast.execution import Execution, Piece, Schedule
from mosaic_fast.loss import Loss, LossBatch, SumCount
from mosaic_fast.policy import Policy

BatchAt = Callable[[Tensor, Tensor | None], LossBatch]
"""From the policy's log-probs, of all tokens or of those at the given places, to what the loss reads."""


def one_pass(
    execution: Execution,
    policy: Policy,
    schedule: Schedule,
    loss: Loss,
    batch_at: BatchAt,
    report: Callable[[Mapping[str, SumCount]], None],
) -> Tensor:  # [T] the policy's log-probs
    """Accumulate the gradient of a loss that is a sum over tokens: forward, loss, backward piece by piece."""
    measured = torch.zeros(
        schedule.forest.num_tokens, dtype=_logprob_dtype(policy), device=policy.model.device
    )

    def loss_of(piece: Piece) -> Tensor:
        own = piece.logprobs.detach()
        measured[piece.source] = own
        value, metrics = loss(piece.logprobs, batch_at(own, piece.source), piece.entropy)
        report(metrics)
        return value

    execution.backward(policy, schedule, loss_of)
    return execution.world.sum(measured)


def two_passes(
    execution: Execution,
    policy: Policy,
    schedule: Schedule,
    loss: Loss,
    batch_at: BatchAt,
    report: Callable[[Mapping[str, SumCount]], None],
) -> Tensor:  # [T] the policy's log-probs
    """Accumulate the gradient of any loss, whatever it couples.

    Pass A, without gradient, gives all log-probs and entropies; the loss of these small arrays gives
    g = dL/dlogp and dL/dentropy; pass B backpropagates sum(g * logp) piece by piece.
    """
    measured, entropy = execution.logprobs(policy, schedule)
    leaves = measured.clone().requires_grad_(), entropy.clone().requires_grad_()
    value, metrics = loss(leaves[0], batch_at(measured, None), leaves[1])
    report(metrics)
    if not value.requires_grad:  # nothing in reach
        return measured
    by_logprob, by_entropy = torch.autograd.grad(value, leaves, allow_unused=True)

    def loss_of(piece: Piece) -> Tensor:
        total = _linear(piece.logprobs, by_logprob, piece.source)
        return total if by_entropy is None else total + _linear(piece.entropy, by_entropy, piece.source)

    execution.backward(policy, schedule, loss_of)
    return measured


def _linear(values: Tensor, gradient: Tensor | None, source: Tensor) -> Tensor:
    """sum of gradient * values, with 0 for a non-finite value of gradient 0."""
    if gradient is None:
        return values.sum() * 0.0
    gradient = gradient[source]
    return (gradient * torch.where(gradient != 0, values, 0.0)).sum()


def _logprob_dtype(policy: Policy) -> torch.dtype:
    return torch.float64 if policy.model.dtype == torch.float64 else torch.float32
