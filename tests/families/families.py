"""Tiny random models of the families of the table, run wholly in fp64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mosaic_fast.policy.small_copy import _draw

VOCAB = 23
_SIZES: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_WINDOWS: dict[str, object] = {
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_EXPERTS: dict[str, object] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4}
_ROPE: dict[str, object] = {"rope_type": "default", "rope_theta": 100.0}
_OWN_HEADS = ("glm4_moe_lite", "deepseek_v3", "olmoe", "kimi_linear")
_MLA: dict[str, object] = {
    "q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip

DENSE: dict[str, Mapping[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "mistral": {"sliding_window": 3},
    "ministral": _WINDOWS,
    "ministral3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.7,
    },
    "olmo2": {},
    "olmo3": _WINDOWS,
    "glm4": {},
    "exaone4": _WINDOWS,
    "apertus": {},
    "cohere2": {**_WINDOWS, "logit_scale": 0.3},
    "gemma2": {**_WINDOWS, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {**_WINDOWS, "final_logit_softcapping": 5.0},
    "gemma4_text": {
        **_WINDOWS,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
        "final_logit_softcapping": 5.0,
    },
}
EXPERTS: dict[str, Mapping[str, object]] = {
    "qwen3_moe": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3},
    "olmoe": {**_EXPERTS, "clip_qkv": 2.0},
    "glm4_moe": {
        **_EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {**_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _ROPE},
    "llama4_text": {
        "num_local_experts": 2,
        "intermediate_size_mlp": 24,
        "attention_chunk_size": 4,
        "interleave_moe_layer_step": 2,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
        "floor_scale": 4,
    },
    "glm4_moe_lite": {**_MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_MLA, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
}
_DELTA: dict[str, object] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MAMBA: dict[str, object] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 6,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}
RECURRENT: dict[str, Mapping[str, object]] = {
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 16},
    "olmo_hybrid": _DELTA,
    "kimi_linear": {
        **_MLA,
        "q_lora_rank": None,
        "num_local_experts": 4,
        "linear_num_heads": 4,
        "linear_head_dim": 6,
        "layer_types": _DELTA["layer_types"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {
        **_EXPERTS,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_MAMBA,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "ssm_state_size": 5,
        "chunk_size": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
}
REFUSED: dict[str, tuple[Mapping[str, object], str]] = {
    "phimoe": ({"num_local_experts": 4}, "draws random numbers in training mode"),
    "falcon_mamba": ({"state_size": 4, "intermediate_size": 64}, "mixes positions outside attention"),
}
PROVED = {**DENSE, **EXPERTS, **RECURRENT}


def config_of(family: str, sizes: Mapping[str, object] = _SIZES) -> PreTrainedConfig:
    """Of a family of the table, proved or refused."""
    more = PROVED[family] if family in PROVED else REFUSED[family][0]
    sizes = {k: v for k, v in {**sizes, **more}.items() if not (k == "head_dim" and family in _OWN_HEADS)}
    return AutoConfig.for_model(family, **sizes)


def model_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Every weight random. Experts are run one by one in fp64, which grouped products refuse."""
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **experts)
    _draw(model, 0)
    module: torch.nn.Module = model
    module.to(dtype)
    return model.train()


@contextmanager
def wholly_fp64() -> Iterator[None]:
    """fp64 stays fp64 where transformers goes through fp32: in norms and in the softmax of routers.

    With that detour two exact computations differ by 1e-7, as roundings fall otherwise.
    """
    with ExitStack() as patches:
        for owner, name in (
            (Tensor, "float"),
            (Tensor, "to"),
            (Tensor, "type"),
            (torch.nn.functional, "softmax"),
            (torch, "softmax"),
        ):
            patches.enter_context(patch.object(owner, name, _kept(getattr(owner, name), name)))
        yield


def _kept(stock: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def function(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if x.dtype != torch.float64:
            return stock(x, *args, **kwargs)
        if name == "float":
            return x
        kept = {k: v for k, v in kwargs.items() if v is not torch.float32}
        rest = [one for one in args if one is not torch.float32]
        return x if name in ("to", "type") and not rest and not kept else stock(x, *rest, **kept)

    return function


REPRESENTATIVES = ("gemma4_text", "mixtral", "qwen3_5_text", "nemotron_h", "phimoe")
"""Shared keys, experts, a delta rule with convolutions, Mamba 2 beside bare MLPs, random routing."""


def shown(families: Mapping[str, object], always: Sequence[str] = REPRESENTATIVES) -> list[str]:
    """The families that are tested: with MOSAIC_TEST_FAMILIES all, else one of each kind."""
    every = bool(os.environ.get("MOSAIC_TEST_FAMILIES"))
    return [family for family in families if every or family in always]
