"""The two ways to accumulate the gradient of a loss over the forwards of a schedule, both exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mosaic_fast.learner.execution import Execution, MicroBatch, Schedule
from mosaic_fast.losses import Loss, LossBatch, SumCount
from mosaic_fast.policy import Policy

BatchAt = Callable[[Tensor, Tensor | None], LossBatch]
"""From the policy's log-probs, of all tokens or of those at the given places, to what the loss reads."""


def accumulate(
    execution: Execution,
    policy: Policy,
    schedule: Schedule,
    loss: Loss,
    batch_at: BatchAt,
    report: Callable[[Mapping[str, SumCount]], None],
) -> Tensor:  # [T] the policy's log-probs
    """Accumulate the gradient of a loss that is a sum over tokens: a micro-batch at a time."""
    measured = torch.zeros(
        schedule.forest.num_tokens, dtype=_logprob_dtype(policy), device=policy.model.device
    )

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        own = micro_batch.logprobs.detach()
        measured[micro_batch.source] = own
        value, metrics = loss(micro_batch.logprobs, batch_at(own, micro_batch.source), micro_batch.entropy)
        report(metrics)
        return value

    execution.backward(policy, schedule, loss_of)
    return execution.world.sum(measured)


def accumulate_coupled(
    execution: Execution,
    policy: Policy,
    schedule: Schedule,
    loss: Loss,
    batch_at: BatchAt,
    report: Callable[[Mapping[str, SumCount]], None],
) -> Tensor:  # [T] the policy's log-probs
    """Accumulate the gradient of any loss, whatever it couples.

    Pass A, without gradient, gives all log-probs and entropies; the loss of these small arrays gives
    g = dL/dlogp and dL/dentropy; pass B backpropagates sum(g * logp) one micro-batch after the other.
    """
    measured, entropy = execution.logprobs(policy, schedule)
    leaves = measured.clone().requires_grad_(), entropy.clone().requires_grad_()
    value, metrics = loss(leaves[0], batch_at(measured, None), leaves[1])
    report(metrics)
    if not value.requires_grad:  # the loss reads nothing
        return measured
    by_logprob, by_entropy = torch.autograd.grad(value, leaves, allow_unused=True)

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        total = _linear(micro_batch.logprobs, by_logprob, micro_batch.source)
        return (
            total
            if by_entropy is None
            else total + _linear(micro_batch.entropy, by_entropy, micro_batch.source)
        )

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
