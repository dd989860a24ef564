"""The one place that knows transformers: a causal LM run on a packed row of tokens, attending as it is told.

A forward runs on a packed row of T tokens, of any sequences and positions. What each of them attends to is
known to the `Attend` that travels with the forward: it keeps the new keys and values, too.

The model is used as it is. What is ours goes in through public doors: an attention function selected by
name, a keyword that reaches it, explicit position ids. Whoever knows the model's layout may hand in a
`Decoder` that computes the same without its modules' overhead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from mosaic_rollout.engine.attention import Scores, chunk_of, tempered
from mosaic_rollout.engine.recurrent import Handed, States, on_forest, recurrent_modules
from mosaic_rollout.engine.segments import Segments

ATTENTION_NAME = "mosaic_engine_attention"
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_RECURRENT_TYPES = {"linear_attention", "conv", "hybrid", "mlp", "moe"}


class Attend(Handed, Protocol):
    """Keys, values and visibility of one forward's T tokens; and the states of recurrent layers."""

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep the new keys [T, Hkv, Dk] and values [T, Hkv, Dv] of a layer."""
        ...

    def attend(self, layer: int, query: Tensor, scores: Scores) -> Tensor:
        """[T, Hq, Dk] -> [T, Hq, Dv], over what has been stored."""
        ...


def served_attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, Dk]
    key: Tensor,  # [1, Hkv, T, Dk]
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: Tensor | None,  # never read
    *,
    served: Attend | None = None,
    served_at: Tensor | None = None,  # [T] positions
    served_layers: Mapping[int, int] | None = None,  # those with keys, counted; None: all
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [Hq] a sink a head
    **unused: object,
) -> tuple[Tensor, None]:  # [1, T, Hq, Dv]
    """transformers' attention signature in front of an `Attend`."""
    if served is None or served_at is None:
        raise ValueError(f"{type(module).__name__} does not hand keywords on to its attention")
    if unused.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} uses position_bias, which LocalEngine does not serve")
    layer = module.layer_idx
    assert isinstance(layer, int)
    layer = layer if served_layers is None else served_layers[layer]
    served.store(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = Scores(scale, sliding_window, chunk_of(module), softcap, s_aux)
    query = tempered(module, query, served_at)
    return served.attend(layer, query[0].transpose(0, 1), scores)[None], None


def register() -> None:
    """Make `served_attention` selectable by name in a model's configuration."""
    AttentionInterface.register(ATTENTION_NAME, served_attention)


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
    states: Mapping[int, States] = field(default_factory=dict)  # what recurrent layers begin a sequence with

    @cached_property
    def state_tokens(self) -> int:
        """How many tokens' keys and values take as much memory as the states of one sequence."""
        token = self.layers * self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize
        return -(-sum(x.nbytes for states in self.states.values() for x in states) // token)

    def allocate(self, *sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised keys [layers, (rows,) Hkv, tokens, Dk] and values [.., Dv], sizes (rows,) tokens."""
        lead = (self.layers, *sizes[:-1], self.heads, sizes[-1])
        keys = torch.empty(*lead, self.key_dim, dtype=self.dtype, device=self.device)
        return keys, torch.empty(*lead, self.value_dim, dtype=self.dtype, device=self.device)


class Decoder(Protocol):
    """The forward of a model on packed tokens, computed without calling its modules."""

    def forward(self, tokens: Tensor, positions: Tensor, served: Attend, *, logits: bool) -> Tensor:
        """As `CausalModel.forward`."""
        ...


DecoderOf = Callable[[PreTrainedModel], Decoder | None]
"""The decoder of a model as it is now; None where only its modules can say what it computes."""


class CausalModel:
    """A Hugging Face causal LM, with what the engine needs to know of it.

    decoder_of: asked anew whenever the model's modules may have changed.

    Refused by name (ValueError): layers of other types than full, sliding and chunked attention and known
    recurrences, that differ in heads or head size, attention that does not go through transformers' interface
    or hides its window from it. `max_tokens` is the longest sequence served: max_position_embeddings, and no
    further than the original length where the rotary frequencies depend on the longest position in the batch
    (longrope), since a cached key must not depend on its neighbours.
    """

    def __init__(self, model: PreTrainedModel, decoder_of: DecoderOf = lambda model: None) -> None:
        register()
        self._decoder_of = decoder_of
        self.model = model
        config = model.config
        self.vocab_size: int = config.vocab_size
        layer_types = getattr(config, "layer_types", None)
        if unknown := set(layer_types or ()) - _LAYER_TYPES - _RECURRENT_TYPES:
            raise ValueError(
                f"LocalEngine serves full, sliding and chunked attention, this model has {sorted(unknown)}"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        self.fixed_rope = rope.get("rope_type", "default") in _ONE_SCALE_ROPE
        self.max_tokens: int = config.max_position_embeddings
        if not self.fixed_rope:
            self.max_tokens = rope.get("original_max_position_embeddings") or self.max_tokens
            if rope["rope_type"] == "dynamic":  # at the last position itself its base may still be grown
                self.max_tokens = min(self.max_tokens, config.max_position_embeddings - 1)
        accepted = inspect.signature(model.forward).parameters
        self._only_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._decoder: Decoder | None = None
        self._modules = list(model.modules())
        self._recurrent = recurrent_modules(model)
        self._layers: dict[int, int] | None = None
        self.shape = self._probe()
        self.refresh()

    def refresh(self) -> None:
        """Look at the module tree again: hooks or adapters may have been put in, or weights replaced."""
        self._modules = list(self.model.modules())
        self._recurrent = recurrent_modules(self.model)
        self._decoder = self._decoder_of(self.model) if self.fixed_rope else None

    def _probe(self) -> KeyValueShape:
        """Learn the cache's shape from one token, rather than from the many spellings of configs."""
        seen, config = _Probe(self.model.device), self.model.config
        token = torch.zeros(1, dtype=torch.long, device=self.model.device)
        with self.serving():
            self.forward(token, token, seen, logits=False)
        if not seen.shapes or (not seen.states and len(seen.shapes) != config.num_hidden_layers):
            raise ValueError(
                "LocalEngine serves models whose layers call transformers' attention interface once each; "
                f"{type(self.model).__name__} called it {len(seen.shapes)} times"
            )
        if len(set(seen.shapes)) != 1:
            raise ValueError(
                f"LocalEngine needs the same heads and head size in all layers, found {set(seen.shapes)}"
            )
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(seen.windows)
        expected = [window if types[layer] == "sliding_attention" else None for layer in seen.layers]
        if seen.windows != expected:
            raise ValueError(
                f"{type(self.model).__name__} hands windows {seen.windows} to its attention, "
                f"its configuration says {expected}"
            )
        if seen.states:  # not all layers have keys
            self._layers = {layer: number for number, layer in enumerate(seen.layers)}
        states = {layer: tuple(map(torch.zeros_like, left)) for layer, left in seen.states.items()}
        return KeyValueShape(len(seen.shapes), *seen.shapes[0], states)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Evaluation mode, no autograd, our attention; all three as found again afterwards.

        The trainer uses the same module and config between two iterations, hence never held across an await.
        """
        # rotary embeddings that rewrite their buffers must not leave inference tensors in the trainer's model
        no_grad = torch.inference_mode() if self.fixed_rope else torch.no_grad()
        if self._decoder is not None:  # no module is called
            with no_grad:
                yield
            return
        config, attention = self.model.config, self.model.config._attn_implementation
        in_training = [module for module in self._modules if module.training]
        try:
            config._attn_implementation = ATTENTION_NAME
            for module in in_training:
                object.__setattr__(module, "training", False)  # nn.Module's own is slow, and this hot
            with no_grad, on_forest(self._recurrent):
                yield
        finally:
            config._attn_implementation = attention
            for module in in_training:
                object.__setattr__(module, "training", True)

    def forward(
        self,
        tokens: Tensor,  # [T] int64
        positions: Tensor,  # [T] int64, each in its own sequence
        served: Attend,
        *,
        logits: bool = True,
    ) -> Tensor:
        """Logits of all tokens, [T, V]; without `logits` only keys and values are wanted, and [0, V] or more
        comes back."""
        if self._decoder is not None:
            return self._decoder.forward(tokens, positions, served, logits=logits)
        output = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            served=served,
            served_at=positions,
            served_layers=self._layers,
            **({} if logits else self._only_last),
        )
        return output.logits[0]


class _Probe:
    """An `Attend` that looks at what it is given, and attends to the token itself."""

    def __init__(self, device: torch.device) -> None:
        self.shapes: list[tuple[int, int, int, torch.dtype, torch.device]] = []
        self.windows: list[int | None] = []
        self.layers: list[int] = []
        self.states: dict[int, States] = {}
        self.segments, self.wants_states = Segments.of(np.array([-1]), device), True

    def begin(self, layer: int) -> None:
        """Nothing."""

    def end(self, layer: int, left: States) -> None:
        self.states[layer] = left

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.layers.append(layer)
        self.shapes.append((key.shape[1], key.shape[2], value.shape[2], key.dtype, key.device))
        self._value = value

    def attend(self, layer: int, query: Tensor, scores: Scores) -> Tensor:
        self.windows.append(scores.window)
        return self._value.repeat_interleave(query.shape[1] // self._value.shape[1], dim=1)
