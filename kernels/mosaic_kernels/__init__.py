"""Tensors in, tensors out: the forest layout and the exact ops of MOSAIC training on shared prefixes."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mosaic_kernels.attention import tree_attention
    from mosaic_kernels.forest.ideal import ideal_speedup
    from mosaic_kernels.forest.layout import PackedForest, pack_forest
    from mosaic_kernels.forest.split import split_forest
    from mosaic_kernels.logprob import linear_logprob
    from mosaic_kernels.preference import forest_preference_loss, pairwise_preference_loss
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

_MODULES = {
    "PackedForest": "forest",
    "clipped_surrogate": "surrogate",
    "forest_preference_loss": "preference",
    "ideal_speedup": "forest.ideal",
    "linear_logprob": "logprob",
    "pack_forest": "forest",
    "pairwise_preference_loss": "preference",
    "split_forest": "forest.split",
    "tree_attention": "attention",
}


def __getattr__(name: str) -> object:
    """Import what is asked for, and no more: the forest needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
