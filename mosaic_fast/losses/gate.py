"""The gate's own gradient: whether to check is one binary decision, and both its outcomes were played.

With p = pi(tag | prefix), the probability of the tag's tokens, and A(side) the mean advantage of the leaves
on that side, the policy gradient at the gate is that of

    p A(open) log p + (1 - p) A(skip) log(1 - p)        (p and A as constants)

an all-action gradient (Sutton et al. 2001, "Comparing policy-gradient algorithms"): no noise from which
side was sampled. Below the gate, leaves are samples given their side, so those of the open side weigh p and
those of the skip side 1 - p; the first tokens of a skip, as many as the tag has, are one action, whose
log-prob is theirs less log(1 - p). Above the gate, a token is credited with p A(open) + (1 - p) A(skip).
Together that is the gradient of the expected reward, with the share of each side known instead of drawn.

Where a policy all but always opens the gate no skip may have been found: then that side, of weight 1 - p,
is left out, and the gate itself gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mosaic_fast.losses.batch import Loss, LossBatch, SumCount
from mosaic_fast.losses.surrogate import SurrogateLoss
from mosaic_kernels import clipped_surrogate
from mosaic_rollout.types import Rollout


@dataclass(frozen=True)
class GateSides:
    """A gate that was taken both ways, by rollouts that are equal before it."""

    position: int  # index of the gate's first token in each of them
    tag_length: int
    opened: tuple[int, ...]  # index among the step's rollouts
    skipped: tuple[int, ...]

    @property
    def members(self) -> tuple[int, ...]:
        return self.opened + self.skipped


def gates_of(rollouts: Sequence[Rollout]) -> tuple[GateSides, ...]:
    """The contrasted gates of a step's rollouts. A gate that nobody opened has no sides."""
    sides: dict[int, tuple[list[int], list[int]]] = {}
    gates = {}
    for index, rollout in enumerate(rollouts):
        if rollout.gate is not None:
            gates[rollout.gate.trunk_id] = rollout.gate
            sides.setdefault(rollout.gate.trunk_id, ([], []))[not rollout.gate.opened].append(index)
    return tuple(
        GateSides(gates[trunk].position, len(gates[trunk].tag), tuple(opened), tuple(skipped))
        for trunk, (opened, skipped) in sides.items()
        if opened
    )


@dataclass(frozen=True)
class _GateTokens:
    """Where one gate is among N tokens in flat order, and what its leaves are worth."""

    tag: Tensor  # [m] in one rollout that opened it
    above: Tensor  # tokens before the gate, in all members
    opened: Tensor  # tokens after the tag
    skipped: Tensor  # tokens after the first m sampled ones
    blocks: Tensor  # [K, m] the first sampled tokens of each skip; short ones repeat their last
    block_mask: Tensor  # [K, m] bool
    block_advantages: Tensor  # [K]
    open_advantage: float
    skip_advantage: float
    weight: float  # of the decision: what its members' tokens weigh together
    open_count: int
    skip_count: int


@dataclass(frozen=True)
class Gates:
    """The gates of a step: their tag's tokens leave the ordinary loss, and `GatedLoss` takes them over."""

    sides: tuple[GateSides, ...]
    cu_seqlens: np.ndarray  # [R+1] int64 of the whole step
    advantages: np.ndarray  # [R] float64
    weights: np.ndarray  # [T] float64, before the tags left

    def tag_tokens(self) -> np.ndarray:  # int64, in [0, T)
        """The tags' tokens, in every rollout that has them."""
        found = [
            self.cu_seqlens[r] + gate.position + np.arange(gate.tag_length)
            for gate in self.sides
            for r in gate.opened
        ]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def without_tags(self) -> np.ndarray:  # [T] float64
        """The weights of the ordinary loss."""
        weights = self.weights.copy()
        weights[self.tag_tokens()] = 0.0
        return weights

    def reached(self, counted: np.ndarray) -> np.ndarray:  # [T] bool -> [T] bool
        """The tokens whose log-probs the gates need: the counted ones of their members, and the tags."""
        reached = np.zeros_like(counted)
        for gate in self.sides:
            for r in gate.members:
                reached[self.cu_seqlens[r] : self.cu_seqlens[r + 1]] = True
        reached &= counted
        reached[self.tag_tokens()] = True
        return reached

    def loss(self, inner: SurrogateLoss, source: np.ndarray, device: torch.device) -> GatedLoss:
        """The loss on the tokens in reach. source: [N] int64, their indices among the T tokens."""
        place = np.full(len(self.weights), -1, np.int64)
        place[source] = np.arange(len(source))
        return GatedLoss(inner, tuple(self._tokens(gate, place, device) for gate in self.sides))

    def _tokens(self, gate: GateSides, place: np.ndarray, device: torch.device) -> _GateTokens:
        m, start = gate.tag_length, self.cu_seqlens[:-1] + gate.position

        def tokens(parts: list[np.ndarray]) -> Tensor:
            found = place[np.concatenate(parts)] if parts else np.zeros(0, np.int64)
            return torch.from_numpy(found[found >= 0]).to(device)

        stop = self.cu_seqlens[1:]
        # A skip that ended its turn within m tokens is a shorter action.
        lengths = [self._run_length(int(start[r]), int(min(start[r] + m, stop[r]))) for r in gate.skipped]
        blocks = [
            start[r] + np.minimum(np.arange(m), n - 1) for r, n in zip(gate.skipped, lengths, strict=True)
        ]
        of_side = [
            self.advantages[list(side)].mean() if side else 0.0 for side in (gate.opened, gate.skipped)
        ]
        return _GateTokens(
            tag=tokens([start[gate.opened[0]] + np.arange(m)]),
            above=tokens([np.arange(self.cu_seqlens[r], start[r]) for r in gate.members]),
            opened=tokens([np.arange(start[r] + m, stop[r]) for r in gate.opened]),
            skipped=tokens(
                [np.arange(start[r] + n, stop[r]) for r, n in zip(gate.skipped, lengths, strict=True)]
            ),
            blocks=tokens(blocks).reshape(len(blocks), m),
            block_mask=torch.arange(m, device=device) < torch.tensor(lengths, device=device)[:, None],
            block_advantages=torch.from_numpy(self.advantages[list(gate.skipped)]).to(device),
            open_advantage=float(of_side[0]),
            skip_advantage=float(of_side[1]),
            weight=float(self.weights[start[list(gate.members)]].sum()),
            open_count=len(gate.opened),
            skip_count=len(gate.skipped),
        )

    def _run_length(self, start: int, stop: int) -> int:
        """How many tokens from `start` on were sampled in one go."""
        untrained = np.flatnonzero(self.weights[start:stop] == 0)
        return int(untrained[0]) if len(untrained) else stop - start


@dataclass(frozen=True)
class GatedLoss(Loss):
    """A surrogate loss with the gates' own gradient."""

    inner: SurrogateLoss
    gates: tuple[_GateTokens, ...]

    def __call__(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """Scalar loss and metrics of the whole step. policy_logprobs, entropy: [N], differentiable."""
        weights, advantages = batch.weights.clone(), batch.advantages.clone()
        extra = policy_logprobs.new_zeros(())
        opened, pushes = (policy_logprobs.new_zeros((), dtype=torch.float64) for _ in range(2))
        for gate in self.gates:
            p = torch.exp(batch.old_logprobs[gate.tag].sum())
            size = gate.open_count + gate.skip_count
            advantages[gate.above] = p * gate.open_advantage + (1.0 - p) * gate.skip_advantage
            weights[gate.opened] *= size * p / gate.open_count
            if gate.skip_count:
                of_skip = size * (1.0 - p) / gate.skip_count
                weights[gate.skipped] *= of_skip
                block_weights = weights[gate.blocks[:, 0]] * of_skip
                weights[gate.blocks] = 0.0
                extra = extra + self._decision(policy_logprobs, batch, gate)
                extra = extra + self._blocks(policy_logprobs, batch, gate, block_weights)
            opened = opened + p
            if gate.skip_count:
                pushes = pushes + (p * (1.0 - p)).double() * (gate.open_advantage - gate.skip_advantage)
        changed = replace(batch, weights=weights, advantages=advantages)
        loss, metrics = self.inner(policy_logprobs, changed, entropy)
        loss = loss + extra
        count = float(len(self.gates))
        return loss, {
            **metrics,
            "policy/gate_open": SumCount(opened, count),
            "policy/gate_push": SumCount(pushes, count),  # on the logit of p, above 0 towards the check
            "policy/loss": SumCount(loss.detach().double(), 0.0),
        }

    def _decision(self, policy_logprobs: Tensor, batch: LossBatch, gate: _GateTokens) -> Tensor:
        """The all-action surrogate, and the whole KL divergence of the two-sided decision."""
        log_p = policy_logprobs[gate.tag].sum()
        log_skip = log_one_minus_exp(log_p)
        p = torch.exp(log_p.detach())
        gain = p * gate.open_advantage * log_p + (1.0 - p) * gate.skip_advantage * log_skip
        term = -gain
        if self.inner.kl_weight and batch.reference_logprobs is not None:
            log_q = batch.reference_logprobs[gate.tag].sum()
            divergence = torch.exp(log_p) * (log_p - log_q)
            divergence = divergence + torch.exp(log_skip) * (log_skip - log_one_minus_exp(log_q))
            term = term + self.inner.kl_weight * divergence
        return gate.weight * term

    def _blocks(
        self, policy_logprobs: Tensor, batch: LossBatch, gate: _GateTokens, weights: Tensor
    ) -> Tensor:
        """The first tokens of each skip as one action: clipped, with its own ratio and KL estimate."""

        def of_blocks(logprobs: Tensor) -> Tensor:  # [N] -> [K]
            tokens = torch.where(gate.block_mask, logprobs[gate.blocks], 0.0)
            return tokens.sum(1) - log_one_minus_exp(logprobs[gate.tag].sum())

        reference = batch.reference_logprobs
        return clipped_surrogate(
            of_blocks(policy_logprobs),
            of_blocks(batch.old_logprobs),
            gate.block_advantages.to(policy_logprobs.dtype),
            weights,
            reference_logprobs=None if reference is None else of_blocks(reference),
            clip_low=self.inner.clip_low,
            clip_high=self.inner.clip_high,
            kl_weight=self.inner.kl_weight,
            backend=self.inner.backend,
        ).sum()


def log_one_minus_exp(log_p: Tensor) -> Tensor:
    """log(1 - p) from log p, without cancellation; p is kept one rounding below 1. Scalar -> scalar."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return torch.where(
        log_p > -0.6931471805599453, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p))
    )
