"""What a training step hands to the learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mosaic_fast.credit import Forks, forks_of
from mosaic_fast.gate import GateSides, gates_of
from mosaic_kernels import PackedForest, pack_forest
from mosaic_rollout.types import Rollout


@dataclass(frozen=True)
class StepBatch:
    """R rollouts of a training step, T tokens in all, P judged pairs.

    Two groups of two rollouts: groups [0, 0, 1, 1], pairs [[0, 1], [2, 3]], preference [1.0, 0.5].
    """

    forest: PackedForest
    sampler_logprobs: np.ndarray  # [T] float32, the engine's; 0 where not trained
    advantages: np.ndarray  # [R] float64
    returns: np.ndarray  # [R] float64, the rewards before they were normalised
    groups: np.ndarray  # [R] int64
    forks: Forks
    pairs: np.ndarray  # [P, 2] int64 in [0, R), every pair of a group once
    preference: np.ndarray  # [P] float64 in [0, 1]: 1 if the first of the pair is better, 0.5 for a tie
    gates: tuple[GateSides, ...] = ()  # that were taken both ways


def step_batch(
    groups: Sequence[Sequence[Rollout]],
    preferences: Sequence[np.ndarray],  # [G, G] a group
    returns: Sequence[np.ndarray],  # [G] a group
    advantages: Sequence[np.ndarray],  # [G] a group
) -> StepBatch:
    """Pack the rollouts of all groups into one forest, with what the losses need of them."""
    rollouts = [rollout for group in groups for rollout in group]
    pairs, preference = judged_pairs(preferences)
    return StepBatch(
        forest=pack_forest([r.token_ids for r in rollouts], [r.trained for r in rollouts]),
        sampler_logprobs=np.concatenate([r.sampler_logprobs for r in rollouts]),
        advantages=np.concatenate(advantages),
        returns=np.concatenate(returns),
        groups=np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        forks=forks_of(rollouts),
        pairs=pairs,
        preference=preference,
        gates=gates_of(rollouts),
    )


def judged_pairs(preferences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:  # [P, 2], [P]
    """Every pair i < j of every group, by index among all rollouts, and how sure the judge is of i."""
    pairs, labels, first = [np.zeros((0, 2), np.int64)], [np.zeros(0)], 0
    for matrix in preferences:
        above = np.triu_indices(len(matrix), 1)
        pairs.append(first + np.stack(above, axis=1))
        labels.append(np.asarray(matrix, np.float64)[above])
        first += len(matrix)
    return np.concatenate(pairs), np.concatenate(labels)
