"""What a loss is, what it reads and what it gives. Importable without torch, since settings are.

A loss adds up terms of tokens with weights that hold the credit and a normaliser of the whole step, known
before the first micro-batch. `LossBatch` has the sums that several losses share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mosaic_kernels import PackedForest

Normalisation = Literal["token", "sequence", "constant"]
Couples = Literal["token", "rollout", "pair", "step"]
"""What of a step has a say in a token's gradient: itself alone, its rollout, those judged with it, or all."""


@dataclass(frozen=True)
class SumCount:
    """A metric until the sink: a sum over `count` things, so that parts can be added.

    Either may be a number or a scalar on the policy's device, which nobody waits for before `read_metrics`.
    """

    sum: float | Tensor
    count: float | Tensor

    def __add__(self, other: SumCount) -> SumCount:
        return SumCount(self.sum + other.sum, self.count + other.count)


def read_metrics(metrics: Mapping[str, SumCount]) -> dict[str, tuple[float, float]]:
    """Sum and count of every metric as numbers, for which their device is waited for once."""
    import torch

    values = [value for one in metrics.values() for value in (one.sum, one.count)]
    on_device = [value for value in values if isinstance(value, torch.Tensor)]
    read = iter(torch.stack([value.double() for value in on_device]).tolist() if on_device else ())
    numbers = iter([next(read) if isinstance(value, torch.Tensor) else value for value in values])
    return {name: (next(numbers), next(numbers)) for name in metrics}


@dataclass(frozen=True)
class Selection:
    """Some rollouts of a step."""

    tokens: Tensor  # [N] bool, theirs
    pairs: Tensor  # [p] int64, the judged pairs of which both are among them


@dataclass(frozen=True)
class LossBatch:
    """What a loss reads beside the policy's log-probs, for N rollout tokens in flat order.

    Coupled losses are given the whole step, in which maybe only some rollouts count (`of_rollouts`); the
    others may be given any part of it (`part`).

    Two rollouts of [prompt, token, token] under `token` normalisation:
        cu_seqlens [0, 3, 6]   weights [0, 1/4, 1/4,  0, 1/4, 1/4]   pairs [[0, 1]]   preference [1.0]
    """

    old_logprobs: Tensor  # [N] the policy's own at the step's start: denominator of the clipped ratio
    reference_logprobs: Tensor | None  # [N] of the frozen reference policy
    advantages: Tensor  # [N] times the off-policy weight, if there is one
    weights: Tensor  # [N] >= 0: credit over the normaliser of the whole step; 0: the token does not count
    cu_seqlens: Tensor | None = None  # [R+1] int64, where rollouts begin; None in a part
    pairs: Tensor | None = None  # [P, 2] int64, judged pairs of rollouts; None in a part
    preference: Tensor | None = None  # [P] in [0, 1]: 1 if the first of the pair is better, 0.5 for a tie
    step_pairs: int | None = None  # judged pairs of the whole step; None: P

    @property
    def counted(self) -> Tensor:  # [N] bool
        return self.weights > 0

    def part(self, source: Tensor) -> LossBatch:
        """The tokens at `source` [n] int64."""
        reference = self.reference_logprobs
        return LossBatch(
            self.old_logprobs[source],
            None if reference is None else reference[source],
            self.advantages[source],
            self.weights[source],
        )

    def selection(self, rollouts: np.ndarray) -> Selection:  # [R] bool
        """What `of_rollouts` takes, found before the first forward, as it waits for the device."""
        import torch

        chosen = torch.from_numpy(rollouts).to(self.weights.device)
        both = chosen[:0] if self.pairs is None else chosen[self.pairs].all(dim=1)
        return Selection(chosen[self.rollout_of], both.nonzero()[:, 0])

    def of_rollouts(self, selected: Selection) -> LossBatch:
        """The whole step, in which only some rollouts count, and the pairs of them."""
        batch = self.without(~selected.tokens)
        if self.pairs is None or self.preference is None:
            return batch
        return replace(
            batch,
            pairs=self.pairs[selected.pairs],
            preference=self.preference[selected.pairs],
            step_pairs=len(self.pairs) if self.step_pairs is None else self.step_pairs,
        )

    def without(self, dropped: Tensor) -> LossBatch:
        """The batch in which the tokens where `dropped` [N] is True do not count."""
        return replace(self, weights=self.weights.where(~dropped, 0.0))

    @property
    def rollout_of(self) -> Tensor:
        """The rollout of each token, [N] int64, of a whole step."""
        import torch

        assert self.cu_seqlens is not None, "a coupled loss is given the whole step"
        return torch.repeat_interleave(self.cu_seqlens.diff())

    def weighted_sum(self, values: Tensor) -> Tensor:
        """Sum of weights * values [N], where a value of weight 0 may be anything, even NaN. Scalar."""
        return (self.weights * values.where(self.counted, 0.0)).sum()

    def rollout_sums(self, values: Tensor) -> Tensor:
        """Sum of values [N] over the counted tokens of each rollout [R]; other values may be anything."""
        assert self.cu_seqlens is not None, "a coupled loss is given the whole step"
        from mosaic_kernels.fixed_order import add_up

        return add_up(values.where(self.counted, 0.0), self.rollout_of, len(self.cu_seqlens) - 1)

    def kl_term(self, policy_logprobs: Tensor, kl_weight: float) -> Tensor:
        """kl_weight times the weighted sum of k3 = exp(d) - d - 1, d = reference - policy.

        The estimate of KL(policy || reference) of GRPO, arXiv 2402.03300, equation 4.
        """
        if not kl_weight or self.reference_logprobs is None:
            return policy_logprobs.new_zeros(())
        difference = (self.reference_logprobs - policy_logprobs).where(self.counted, 0.0)
        return kl_weight * self.weighted_sum(difference.expm1() - difference)

    def entropy_term(self, entropy: Tensor | None, entropy_weight: float) -> Tensor:
        """Minus entropy_weight times the weighted sum of entropies [N]: a bonus for staying undecided."""
        if not entropy_weight:
            return self.weights.new_zeros(())
        if entropy is None:
            raise ValueError("entropy_weight above 0 needs entropy [N]")
        return -entropy_weight * self.weighted_sum(entropy)

    def token_metrics(self, policy_logprobs: Tensor, entropy: Tensor | None) -> dict[str, SumCount]:
        """Ratio, KL and entropy: plain sums over the counted tokens."""
        counted, policy = self.counted, policy_logprobs.detach()
        count = counted.sum().double()

        def total(values: Tensor) -> SumCount:
            return SumCount(values.where(counted, 0.0).sum().double(), count)

        metrics = {"policy/ratio": total((policy - self.old_logprobs).exp())}
        if entropy is not None:
            metrics["policy/entropy"] = total(entropy.detach())
        if self.reference_logprobs is not None:
            difference = self.reference_logprobs - policy
            metrics["policy/kl"] = total(difference.expm1() - difference)
        return metrics


class Loss(ABC):
    """A pure function of log-probs, with what it needs of a run declared on its class.

    A loss that `loss.name` knows is a frozen dataclass. Its fields are its settings: those that are keys of
    [loss] are set there, and the field's default is what holds where the key is left open.
    """

    pairwise: ClassVar[bool] = False
    """It compares whole rollouts by judged pairs; credit and off-policy weights do not concern it."""
    divide_by_std: ClassVar[bool] = True
    """Whether advantages are divided by the group's standard deviation, where reward leaves that open."""

    @property
    def normalisation(self) -> Normalisation:
        """What the weights of a step's tokens are divided by, see `normalised_weights`."""
        return "token"

    @property
    def couples(self) -> Couples:
        """Whose log-probs a token's gradient depends on. Adding up the parts of a loss gives the whole.

        A part holds what is coupled: any tokens, whole rollouts, or rollouts with all their pairs.
        """
        return "step"

    @property
    def coupled(self) -> bool:
        """True if a token's gradient depends on other tokens' log-probs."""
        return self.couples != "token"

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the reference policy's log-probs."""
        return False

    @property
    def takes_gates(self) -> bool:
        """Whether rollout.gate_contrast may take over some of its tokens: it clips a token's own ratio."""
        return False

    def tokens_read(
        self,
        forest: PackedForest,
        weights: np.ndarray,  # [T] >= 0: credit over the normaliser, 0 where not trained
        advantages: np.ndarray,  # [T]
        pairs: np.ndarray,  # [P, 2] int64
    ) -> np.ndarray:  # [T] bool
        """The tokens whose log-prob or entropy has a coefficient, or a say in another token's coefficient.

        The others are pruned before the forward. Without more being known, all that count.
        """
        return weights > 0

    @abstractmethod
    def __call__(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """Scalar loss, and metrics as sums and counts. policy_logprobs and entropy: [N], differentiable."""
