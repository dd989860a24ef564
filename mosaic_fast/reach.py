"""Loss reach: what no term of the loss depends on is dropped before the forward.

A token needs its own log-prob if its coefficient in some term is not zero; it needs to be forwarded if that
holds for it or a descendant. So tails after the last needed token go, and subtrees in which nothing is
needed; an edge that is not needed costs no row of the LM head, but stays as context of what is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mosaic_fast.loss import PairwiseLoss, SurrogateLoss
from mosaic_kernels import PackedForest, pack_forest
from mosaic_kernels.preference.tree import needed_nodes


@dataclass(frozen=True)
class Reach:
    """The part of a forest that the loss reaches."""

    forest: PackedForest  # the same rollouts, shorter or empty, trained where needed
    source: np.ndarray  # [T'] int64, index of each of its rollout tokens in the whole forest
    pruned_frac: float  # share of the whole forest's positions that are not forwarded
    pruned_edge_frac: float  # share of its trained rollout tokens whose log-prob is not computed


def needed_tokens(
    loss: SurrogateLoss | PairwiseLoss,
    forest: PackedForest,
    weights: np.ndarray,  # [T] >= 0: credit over the normaliser, 0 where not trained
    advantages: np.ndarray,  # [T]
    pairs: np.ndarray,  # [P, 2] int64
) -> np.ndarray:  # [T] bool
    """The tokens whose log-prob or entropy has a coefficient, or a say in another token's coefficient."""
    counted = weights > 0
    if loss.entropy_weight:
        return counted
    if isinstance(loss, PairwiseLoss):
        if loss.kind == "dpo_norm":  # a shared token's two shares differ with the lengths
            paired = np.zeros(forest.num_rollouts, np.bool_)
            paired[pairs.ravel()] = True
            return counted & paired[_rollout_of(forest)]
        return counted & needed_nodes(forest, pairs)[forest.node_index]
    if loss.kl_weight:
        return counted
    pulled = counted & (advantages != 0)
    if loss.ratio == "sequence":  # the ratio of a rollout is made of all its tokens
        rollout_of = _rollout_of(forest)
        return counted & (np.bincount(rollout_of, pulled, forest.num_rollouts) > 0)[rollout_of]
    return pulled


def narrow(forest: PackedForest, needed: np.ndarray, *, keep_lengths: bool = False) -> Reach:
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
        return Reach(forest, source, 0.0, 0.0)
    tokens = forest.tokens[forest.node_index]
    narrowed = pack_forest([tokens[k] for k in kept], [needed[k] for k in kept])
    pruned_frac = 1.0 - narrowed.num_nodes / forest.num_nodes if forest.num_nodes else 0.0
    return Reach(narrowed, source, pruned_frac, pruned_edge_frac)


def _rollout_of(forest: PackedForest) -> np.ndarray:  # [T] int64
    return np.repeat(np.arange(forest.num_rollouts), np.diff(forest.cu_seqlens))
