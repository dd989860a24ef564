"""The gradient of a loss added up over the forwards of a schedule, whatever the loss couples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mosaic_fast.learner.execution import Coupling, Execution, MicroBatch, Schedule
from mosaic_fast.losses import Loss, LossBatch, SumCount
from mosaic_fast.policy import Policy

BatchAt = Callable[[Tensor, Tensor | None], LossBatch]
"""From the policy's log-probs, of all tokens or of those at the given places, to what the loss reads."""
LossOf = Callable[[MicroBatch], Tensor]
Report = Callable[[Mapping[str, SumCount]], None]
"""Takes a part's metrics; over all parts and ranks they add up to the step's."""


def accumulate(
    execution: Execution,
    policy: Policy,
    schedule: Schedule,
    coupling: Coupling | None,  # None: the loss is a sum over tokens
    loss: Loss,
    batch_at: BatchAt,
    report: Report,
) -> Tensor:  # [T] the policy's log-probs
    """Accumulate the gradient; each rank that of its forwards."""
    double = policy.model.dtype == torch.float64
    measured = torch.zeros(
        schedule.forest.num_tokens,
        dtype=torch.float64 if double else torch.float32,
        device=policy.model.device,
    )
    if coupling is None:

        def loss_of(micro_batch: MicroBatch) -> Tensor:
            own = micro_batch.logprobs.detach()
            measured[micro_batch.source] = own
            value, metrics = loss(
                micro_batch.logprobs, batch_at(own, micro_batch.source), micro_batch.entropy
            )
            report(metrics)
            return value

        execution.backward(policy, schedule, loss_of)
        return execution.world.sum(measured)

    in_rest = _in_two_passes(execution, policy, coupling, loss, batch_at, report, measured)
    in_one = _in_one_pass(coupling, loss, batch_at, report, measured)
    execution.backward(
        policy, schedule, lambda part: (in_one if part.forward in coupling.rollouts else in_rest)(part)
    )
    return measured if coupling.has_rest else execution.world.sum(measured)


def _in_one_pass(
    coupling: Coupling, loss: Loss, batch_at: BatchAt, report: Report, measured: Tensor
) -> LossOf:
    """The loss of a forward that holds all that is coupled with its tokens; fills `measured` [T]."""
    step = batch_at(measured, None)
    here = {part: step.selection(rollouts) for part, rollouts in coupling.rollouts.items()}

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        source, own = micro_batch.source, torch.zeros_like(measured)
        logprobs = own.index_copy(0, source, micro_batch.logprobs)
        entropy = own.index_copy(0, source, micro_batch.entropy)
        measured[source] = micro_batch.logprobs.detach()
        batch = batch_at(logprobs.detach(), None).of_rollouts(here[micro_batch.forward])
        value, metrics = loss(logprobs, batch, entropy)
        report(metrics)
        return value if value.requires_grad else _nothing_of(micro_batch)

    return loss_of


def _in_two_passes(
    execution: Execution,
    policy: Policy,
    coupling: Coupling,
    loss: Loss,
    batch_at: BatchAt,
    report: Report,
    measured: Tensor,
) -> LossOf:
    """The loss of the other forwards, of which a first pass without gradient fills `measured` [T].

    The loss of these small arrays gives g = dL/dlogp and dL/dentropy; what the second pass backpropagates is
    sum(g * logp), one micro-batch after the other.
    """
    entropy = torch.zeros_like(measured)
    if coupling.one_pass.all():
        return _nothing_of
    if coupling.has_rest:
        logprobs, entropy = execution.logprobs(policy, coupling.rest)
        measured.copy_(logprobs)
    leaves = measured.clone().requires_grad_(), entropy.clone().requires_grad_()
    batch = batch_at(measured, None)
    value, metrics = loss(leaves[0], batch.of_rollouts(batch.selection(~coupling.one_pass)), leaves[1])
    if execution.world.is_first:  # every rank has computed all of it
        report(metrics)
    by_logprob: Tensor | None = None
    by_entropy: Tensor | None = None
    if coupling.has_rest and value.requires_grad:
        by_logprob, by_entropy = torch.autograd.grad(value, leaves, allow_unused=True)

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        total = _nothing_of(micro_batch)
        if by_logprob is not None:
            total = total + _linear(micro_batch.logprobs, by_logprob[micro_batch.source])
        if by_entropy is not None:
            total = total + _linear(micro_batch.entropy, by_entropy[micro_batch.source])
        return total

    return loss_of


def _linear(values: Tensor, gradient: Tensor) -> Tensor:
    """sum of gradient * values, with 0 for a non-finite value of gradient 0."""
    return (gradient * torch.where(gradient != 0, values, 0.0)).sum()


def _nothing_of(micro_batch: MicroBatch) -> Tensor:
    """0 with a graph: on several ranks every forward wants its backward pass."""
    return micro_batch.logprobs[:0].sum()
