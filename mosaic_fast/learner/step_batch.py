"""What a training step hands to the learner, and the part of it that the loss reads: the rest is pruned.

A token needs its own log-prob if its coefficient in some term is not zero; it needs to be forwarded if that
holds for it or a descendant. So tails after the last needed token go, and subtrees in which nothing is
needed; an edge that is not needed costs no row of the LM head, but stays as context of what is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mosaic_fast.losses.credit import Forks, forks_of
from mosaic_fast.losses.gate import GateSides, gates_of
from mosaic_kernels import PackedForest, pack_forest
from mosaic_rollout.types import Rollout


@dataclass(frozen=True)
class StepBatch:
    """R rollouts of a training step, T tokens in all, P judged pairs.

    Two groups of two rollouts: pairs [[0, 1], [2, 3]], preference [1.0, 0.5].
    """

    forest: PackedForest  # of S >= R sequences: one for each context of a rollout
    rollout_logprobs: np.ndarray  # [T] float32, the engine's; 0 where not trained
    advantages: np.ndarray  # [R] float64
    returns: np.ndarray  # [R] float64, the rewards before they were normalised
    forks: Forks  # whose cu_seqlens are the rollouts' own
    pairs: np.ndarray  # [P, 2] int64 in [0, R), every pair of a group once
    preference: np.ndarray  # [P] float64 in [0, 1]: 1 if the first of the pair is better, 0.5 for a tie
    gates: tuple[GateSides, ...] = ()  # that were taken both ways

    @property
    def by_rollout(self) -> PackedForest:
        """The forest as losses count in it: a rollout's contexts are one. It is never run or cut."""
        return replace(self.forest, cu_seqlens=self.forks.cu_seqlens)


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
        forest=pack_forest(
            [part for r in rollouts for part in np.split(r.token_ids, r.contexts)],
            [part for r in rollouts for part in np.split(r.trained, r.contexts)],
        ),
        rollout_logprobs=np.concatenate([r.rollout_logprobs for r in rollouts]),
        advantages=np.concatenate(advantages),
        returns=np.concatenate(returns),
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


@dataclass(frozen=True)
class Pruned:
    """The part of a forest that the loss reads."""

    forest: PackedForest  # the same rollouts, shorter or empty, trained where needed
    source: np.ndarray  # [T'] int64, index of each of its rollout tokens in the whole forest
    pruned_frac: float  # share of the whole forest's positions that are not forwarded
    pruned_edge_frac: float  # share of its trained rollout tokens whose log-prob is not computed


def prune(forest: PackedForest, needed: np.ndarray, *, keep_lengths: bool = False) -> Pruned:
    """The smallest forest that gives the log-probs of the needed tokens [T].

    keep_lengths: leave rollouts whole and drop log-probs alone, for models whose rotary frequencies depend on
        a rollout's length.
    """
    needed = needed & forest.trained
    bounds, kept = forest.cu_seqlens.tolist(), []
    for start, stop in pairwise(bounds):
        wanted = np.flatnonzero(needed[start:stop])
        length = stop - start if keep_lengths else int(wanted[-1]) + 1 if len(wanted) else 0
        kept.append(np.arange(start, start + length))
    source = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    edges = int(forest.trained.sum())
    pruned_edge_frac = 1.0 - int(needed.sum()) / edges if edges else 0.0
    if len(source) == forest.num_tokens and not pruned_edge_frac:
        return Pruned(forest, source, 0.0, 0.0)
    tokens = forest.tokens[forest.node_index]
    narrowed = pack_forest([tokens[k] for k in kept], [needed[k] for k in kept])
    pruned_frac = 1.0 - narrowed.num_nodes / forest.num_nodes if forest.num_nodes else 0.0
    return Pruned(narrowed, source, pruned_frac, pruned_edge_frac)
