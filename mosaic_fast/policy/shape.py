"""The sizes of a model that work and memory are counted from, whatever its configuration calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedConfig


@dataclass
class Shape:
    """A `ModelShape` of mosaic_kernels. Of a size that differs between layers it is the general one."""

    hidden_size: int
    intermediate_size: int  # of the MLP; of a mixture all that one token passes
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    sliding_window: int | None
    layer_types: tuple[str, ...] | None
    tie_word_embeddings: bool

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape:
        """The sizes that a configuration describes, of the experts those that are active."""
        # Asked for as an attribute, a size that differs between layers would raise an error.
        values = {**vars(config), **config.to_dict()}

        def size(*names: str) -> int:
            found = (values.get(config.attribute_map.get(name, name)) for name in names)
            value = next((one for one in found if one), 0)
            return max(value) if isinstance(value, list | tuple) else cast(int, value)

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        inner, of_expert = size("intermediate_size"), size("moe_intermediate_size", "intermediate_size")
        if size("num_experts", "num_local_experts", "n_routed_experts"):
            shared = size("shared_expert_intermediate_size") or size("n_shared_experts") * of_expert
            inner = size("num_experts_per_tok", "top_k_experts") * of_expert + shared
        types = getattr(config, "layer_types", None)
        return cls(
            hidden,
            inner or 4 * hidden,
            cast(int, config.num_hidden_layers),
            heads,
            size("num_key_value_heads") or heads,
            size("vocab_size"),
            size("head_dim") or hidden // heads,
            size("sliding_window") or None,
            tuple(types) if types else None,
            bool(values.get("tie_word_embeddings")),
        )
