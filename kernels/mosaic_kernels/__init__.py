"""Tensors in, tensors out: the forest layout and the exact ops of MOSAIC training on shared prefixes."""

from mosaic_kernels.attention import tree_attention
from mosaic_kernels.forest import PackedForest, pack_forest
from mosaic_kernels.ideal import ideal_speedup
from mosaic_kernels.logprob import linear_logprob
from mosaic_kernels.preference import forest_preference_loss, pairwise_preference_loss
from mosaic_kernels.split import split_forest
from mosaic_kernels.surrogate import clipped_surrogate

__all__ = [
    "PackedForest",
    "clipped_surrogate",
    "forest_preference_loss",
    "ideal_speedup",
    "linear_logprob",
    "pack_forest",
    "pairwise_preference_loss",
    "split_forest",
    "tree_attention",
]
