"""What a model computes, counted in multiply-adds and numbers, and how much a forest saves of it.

`ModelSizes` is the one place where a model's shape is turned into counts: the arithmetic ideal below, and the
trainer's cost model, its calibration, the simulation of ranks and the memory estimate read it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mosaic_kernels.forest.layout import BoolArray, IntArray, PackedForest

_WITHOUT_KEYS = ("linear_attention", "conv", "mlp", "moe")
"""Kinds of layers, as configurations call them, whose work is the same for every token."""


class ModelShape(Protocol):
    """What is read from a transformers config; head_dim, sliding_window and layer_types may be absent."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


@dataclass(frozen=True)
class ModelSizes:
    """Counts of a decoder with gated MLPs. A matrix has as many weights as multiply-adds a token.

    Norms, biases and the embedding's lookup are left out: they are hardly any work. A recurrent layer counts
    as an attention layer that sees no key: its projections are of about that size, its states are left out.
    """

    hidden: int
    inner: int  # of the MLP
    queries: int  # numbers of a token's queries in a layer; what attention gives is as many
    keys: int  # numbers of a token's keys in a layer; its values are as many
    head: int  # weights of the LM head
    windows: tuple[
        int | None, ...
    ]  # of each layer, None where a token sees all before it, 0 without attention

    @classmethod
    def of(cls, shape: ModelShape) -> ModelSizes:
        head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        layers = shape.num_hidden_layers
        window: int | None = getattr(shape, "sliding_window", None)
        kinds = getattr(shape, "layer_types", None) or ["sliding_attention"] * layers
        seen = {"sliding_attention": window} | dict.fromkeys(_WITHOUT_KEYS, 0)
        return cls(
            shape.hidden_size,
            shape.intermediate_size,
            shape.num_attention_heads * head_dim,
            shape.num_key_value_heads * head_dim,
            shape.hidden_size * shape.vocab_size,
            tuple(seen.get(kind) for kind in kinds[:layers]),
        )

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def on_keys(self) -> int:
        """Weights of a layer that every token passes: those of the projections to keys and values."""
        return 2 * self.hidden * self.keys

    @property
    def on_queries(self) -> int:
        """Weights of a layer that only tokens with a wanted result pass: queries, output, gated MLP."""
        return self.hidden * (2 * self.queries + 3 * self.inner)

    @property
    def layer(self) -> int:
        """Weights of a layer's matrices."""
        return self.on_keys + self.on_queries

    def attention(self, visible: IntArray, layers: slice = slice(None)) -> float:
        """Multiply-adds of scores and weighted sums in some layers.

        visible: [tokens] how many keys each token sees without a window, itself included.
        """
        pairs = 0
        for window, count in Counter(self.windows[layers]).items():
            pairs += count * int((visible if window is None else np.minimum(visible, window)).sum())
        return 2.0 * self.queries * pairs


def predicting(forest: PackedForest) -> BoolArray:  # [U]
    """The nodes that predict a trained one: the rows of the LM head."""
    found = np.zeros(forest.num_nodes, np.bool_)
    found[forest.parent[forest.node_index[forest.trained]]] = True
    return found


def ideal_speedup(forest: PackedForest, config: ModelShape) -> float:
    """Flat cost / tree cost, each in multiply-adds of one forward pass:

        layers x linear weights x tokens + heads x head_dim x 2 x visible (query, key) pairs of all layers
        + hidden x vocab x labelled rows

    The flat side counts every rollout token and every trained rollout token; the tree side counts nodes
    and distinct rows that predict a trained node. It lies below raw / unique tokens, because pairs and
    labelled rows shrink less. A sliding window limits the pairs of the layers that have one. 1.0 for an
    empty forest.

    Example: 32 rollouts of 600 shared tokens and 30 own ones give about 11, where raw / unique is 12.9.
    """
    if forest.num_nodes == 0:
        return 1.0
    sizes, visible = ModelSizes.of(config), forest.positions + 1

    def cost(visible: IntArray, rows: int) -> float:
        return sizes.layers * sizes.layer * len(visible) + sizes.attention(visible) + sizes.head * rows

    flat = cost(visible[forest.node_index], int(forest.trained.sum()))
    return flat / cost(visible, int(predicting(forest).sum()))
