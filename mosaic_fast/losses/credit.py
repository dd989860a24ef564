"""Credit: the terms of a token that was sampled once and inherited by other rollouts through a fork.

From credit to the weights of a loss: what the sum over tokens is divided by.

A forked rollout holds its trunk's tokens up to the fork: sampled once, by one rollout, held by k. Rollouts
that merely happen to agree share positions of the forest, never credit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mosaic_fast.losses.batch import Normalisation
from mosaic_rollout.types import Rollout

CreditMode = Literal["sum", "mean", "first", "subtree"]


@dataclass(frozen=True)
class Credit:
    """One weight and one advantage a rollout token; a loss is divided by the sum of the weights."""

    weights: np.ndarray  # [T] float64 >= 0
    advantages: np.ndarray  # [T] float64


@dataclass(frozen=True)
class Forks:
    """Which rollout sampled each token, for R rollouts of T tokens in all.

    Two rollouts of 4 tokens, the second forked from the first at token 2:
        cu_seqlens [0, 4, 8]    sampled_at [0, 1, 2, 3,  0, 1, 6, 7]
    """

    cu_seqlens: np.ndarray  # [R+1] int64
    sampled_at: np.ndarray  # [T] int64, the copy of a token that was sampled, among the T tokens

    @property
    def rollout_of(self) -> np.ndarray:  # [T] int64
        return np.repeat(np.arange(len(self.cu_seqlens) - 1), np.diff(self.cu_seqlens))

    @property
    def copies(self) -> np.ndarray:  # [T] int64, k: the rollouts that hold the token
        return np.bincount(self.sampled_at, minlength=len(self.sampled_at))[self.sampled_at]


def find_forks(lengths: Sequence[int], parents: Sequence[int], fork_positions: Sequence[int]) -> Forks:
    """The forks of R rollouts.

    parents: index of the rollout it was forked from, -1 for none. fork_positions: its tokens before this
    index were sampled by an ancestor; without a parent it is not read. A parent may itself be forked.
    ValueError for a parent that is missing or descends from its child, and for a fork beyond an end.
    """
    count, cu_seqlens = len(lengths), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sampled_at = np.arange(cu_seqlens[-1])
    for r in range(count):
        ancestor, inherited, generations = r, int(lengths[r]), 0
        while parents[ancestor] != -1:
            parent, position = parents[ancestor], fork_positions[ancestor]
            if not 0 <= parent < count:
                raise ValueError(f"rollout {ancestor} has parent {parent}, outside [0, {count})")
            if not 0 <= position <= min(lengths[ancestor], lengths[parent]):
                raise ValueError(
                    f"rollout {ancestor} was forked from {parent} at token {position}, beyond an end: "
                    f"they have {lengths[ancestor]} and {lengths[parent]} tokens"
                )
            if (generations := generations + 1) > count:
                raise ValueError(f"rollout {r} descends from itself")
            ancestor, inherited = parent, min(inherited, position)
            start = cu_seqlens[r]
            sampled_at[start : start + inherited] = cu_seqlens[ancestor] + np.arange(inherited)
    return Forks(cu_seqlens, sampled_at)


def forks_of(rollouts: Sequence[Rollout]) -> Forks:
    """The forks of a step's rollouts, from their parent_id and fork_position."""
    index = {rollout.rollout_id: i for i, rollout in enumerate(rollouts)}
    return find_forks(
        [len(rollout.token_ids) for rollout in rollouts],
        [-1 if rollout.parent_id is None else index[rollout.parent_id] for rollout in rollouts],
        [rollout.fork_position or 0 for rollout in rollouts],
    )


def assign_credit(
    mode: CreditMode,
    forks: Forks,
    advantages: np.ndarray,  # [R] float64
    returns: np.ndarray,  # [R] float64, the rewards; read by `subtree` alone
) -> Credit:
    """Weights and advantages of all T tokens, trained or not.

    With A_i the advantages of the k rollouts that hold a token:
        sum      every copy counts in full, with its A_i: the flat batch
        mean     every copy counts 1/k, with its A_i
        first    the sampled copy alone counts, with the A of the rollout that sampled it
        subtree  the sampled copy alone counts, with (mean return of the k rollouts) - (mean return of the
                 rollouts that hold the token before the nearest earlier fork); 0 above the first fork

    In the example of `Forks`, with returns 3 and 1, `subtree` gives [0, 0, 1, 1] and [0, 0, -1, -1] with the
    weights [1, 1, 1, 1] and [0, 0, 1, 1].
    """
    own = np.asarray(advantages, np.float64)[forks.rollout_of]
    if mode == "sum":
        return Credit(np.ones_like(own), own)
    if mode == "mean":
        return Credit(1.0 / forks.copies, own)
    sampled = (forks.sampled_at == np.arange(len(own))).astype(np.float64)
    return Credit(sampled, own if mode == "first" else _subtree_advantages(forks, returns))


def _subtree_advantages(forks: Forks, returns: np.ndarray) -> np.ndarray:  # [T]
    """The holders of a rollout's tokens only ever become fewer along it, and do so exactly at a fork."""
    if not len(forks.sampled_at):
        return np.zeros(0)
    rollout_of, copies = forks.rollout_of, forks.copies
    totals = np.bincount(forks.sampled_at, weights=np.asarray(returns, np.float64)[rollout_of])
    means = totals[forks.sampled_at] / copies
    index = np.arange(len(means))
    begins = np.append(True, rollout_of[1:] != rollout_of[:-1])
    after_fork = ~begins & np.append(False, copies[1:] != copies[:-1])
    branch_start = np.maximum.accumulate(np.where(begins | after_fork, index, 0))
    return np.where(after_fork[branch_start], means - means[branch_start - 1], 0.0)


def normalised_weights(
    credit: np.ndarray,  # [T] float64 >= 0, from `assign_credit`
    trained: np.ndarray,  # [T] bool
    cu_seqlens: np.ndarray,  # [R+1] int64
    normalisation: Normalisation,
    constant: float,
) -> np.ndarray:  # [T] float64
    """Credit of the trained tokens over the step's normaliser; 0 where not trained.

        token     the sum of the credit: every token of the step counts alike (DAPO, arXiv 2503.14476)
        sequence  the sum of the rollout's credit, times the rollouts that have any: every rollout counts
                  alike (GRPO, arXiv 2402.03300, equation 3; GSPO)
        constant  `constant` tokens for every rollout that has any: no rollout's length matters (Dr. GRPO,
                  arXiv 2503.20783, section 3.1)

    Example: two rollouts with 1 and 3 trained tokens. token: 1/4 each; sequence: 1/2, then 1/6 each;
    constant 10: 1/20 each.
    """
    weights = np.where(trained, credit, 0.0)
    if normalisation == "token":
        return weights / (weights.sum() or 1.0)
    rollout_of = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    sums = np.bincount(rollout_of, weights=weights, minlength=len(cu_seqlens) - 1)
    rollouts = max(1, int((sums > 0).sum()))
    if normalisation == "constant":
        return weights / (constant * rollouts)
    return weights / (np.where(sums > 0, sums, 1.0)[rollout_of] * rollouts)
