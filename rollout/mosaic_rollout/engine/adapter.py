"""The one place that knows transformers: a causal LM run on our keys, values, masks and positions.

The model is used as it is. What is ours goes in through public doors: a `Cache` subclass, a 4D mask (a
dictionary of them where the model has full and sliding layers), explicit position ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

_ONE_SCALE_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class KeyValueShape:
    """Shape of what one token leaves in the cache."""

    layers: int
    heads: int  # Hkv
    key_dim: int  # Dk
    value_dim: int  # Dv
    dtype: torch.dtype
    device: torch.device

    def allocate(self, *sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised keys [layers, (rows,) Hkv, tokens, Dk] and values [.., Dv], sizes (rows,) tokens."""
        lead = (self.layers, *sizes[:-1], self.heads, sizes[-1])
        keys = torch.empty(*lead, self.key_dim, dtype=self.dtype, device=self.device)
        return keys, torch.empty(*lead, self.value_dim, dtype=self.dtype, device=self.device)


class CausalModel:
    """A Hugging Face causal LM, with what the engine needs to know of it.

    Refused by name (ValueError): attention layers of other types than full and sliding, layers that differ
    in heads or head size. `max_tokens` is the longest sequence served: max_position_embeddings, and no
    further than the original length where the rotary frequencies depend on the longest position in the
    batch (longrope), since a cached key must not depend on its neighbours.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.refresh()
        config = model.config
        self.vocab_size: int = config.vocab_size
        layer_types = getattr(config, "layer_types", None)
        if unknown := set(layer_types or ()) - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"LocalEngine serves full and sliding attention, this model has {sorted(unknown)}"
            )
        self.window: int | None = getattr(config, "sliding_window", None)
        self.mixed = layer_types is not None and "sliding_attention" in layer_types
        if layer_types is not None and not self.mixed:
            self.window = None
        rope = getattr(config, "rope_parameters", None) or {}
        self.fixed_rope = rope.get("rope_type", "default") in _ONE_SCALE_ROPE
        self.max_tokens: int = config.max_position_embeddings
        if not self.fixed_rope:
            self.max_tokens = rope.get("original_max_position_embeddings") or self.max_tokens
        accepted = inspect.signature(model.forward).parameters
        self._only_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.shape = self._probe()

    def refresh(self) -> None:
        """Look at the module tree again: adapters may have been put in since."""
        self._modules = list(self.model.modules())

    def _probe(self) -> KeyValueShape:
        """Learn the cache's shape from one token, rather than from the many spellings of configs."""
        cache = DynamicCache(config=self.model.config)
        with self.serving():
            token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            self.model(input_ids=token, past_key_values=cache, use_cache=True)
        found: set[KeyValueShape] = set()
        for layer in cache.layers:
            if not isinstance(layer, CacheLayerMixin) or layer.keys is None or layer.values is None:
                raise ValueError(f"LocalEngine cannot cache a layer of kind {type(layer).__name__}")
            heads, key_dim, value_dim = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
            found.add(
                KeyValueShape(
                    len(cache.layers), heads, key_dim, value_dim, layer.keys.dtype, layer.keys.device
                )
            )
        if len(found) != 1:
            raise ValueError(f"LocalEngine needs the same heads and head size in all layers, found {found}")
        return found.pop()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Evaluation mode, no autograd, SDPA attention; all three as found again afterwards.

        The trainer uses the same module and config between two iterations, hence never held across an await.
        """
        config, attention = self.model.config, self.model.config._attn_implementation
        in_training = [module for module in self._modules if module.training]
        # rotary embeddings that rewrite their buffers must not leave inference tensors in the trainer's model
        no_grad = torch.inference_mode() if self.fixed_rope else torch.no_grad()
        try:
            config._attn_implementation = "sdpa"
            for module in in_training:
                object.__setattr__(module, "training", False)  # nn.Module's own is slow, and this hot
            with no_grad:
                yield
        finally:
            config._attn_implementation = attention
            for module in in_training:
                object.__setattr__(module, "training", True)

    def forward(
        self,
        tokens: torch.Tensor,  # [B, T] int64
        positions: torch.Tensor,  # [B, T] int64
        visible: torch.Tensor,  # [B, T, K] bool: query t may see key k, windows left aside
        key_positions: torch.Tensor,  # [B or 1, K] int64
        cache: Cache,  # its update() takes T new tokens and returns K keys and values
    ) -> torch.Tensor:
        """Logits of the last token, [B, V]."""
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._masks(visible, positions, key_positions),
            past_key_values=cache,
            use_cache=True,
            **self._only_last,
        )
        return output.logits[:, -1]

    def _masks(
        self, visible: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        if self.window is None:
            return self._additive(visible)
        near = positions[:, :, None] - key_positions[:, None, :] < self.window
        windowed = self._additive(visible & near)
        if not self.mixed:
            return windowed
        return {"full_attention": self._additive(visible), "sliding_attention": windowed}

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        """[B, 1, T, K] of the model's dtype: SDPA would convert a boolean mask once a layer."""
        mask = torch.zeros(visible.shape, dtype=self.shape.dtype, device=visible.device)
        return mask.masked_fill_(~visible, -torch.inf)[:, None]
