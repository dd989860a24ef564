"""From credit to the weights of a loss: what the sum over tokens is divided by."""

from __future__ import annotations

from typing import Literal

import numpy as np

Normalisation = Literal["token", "sequence", "constant"]


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
