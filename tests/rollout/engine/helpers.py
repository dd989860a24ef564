"""Tiny random models of each family, and a sampler so simple that it can be the oracle."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mosaic_fast.policy import StockDecoder
from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.engine.sampling import sample_tokens, stream_base, uniforms
from mosaic_rollout.types import Completion, Request, SamplingParams

VOCAB = 61
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # far from uniform: a wrong mask or position shows
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi3": ("phi3", {}),
    "phi3_window": ("phi3", {"sliding_window": 7}),
    "phi3_longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 2.5, 3.0, 4.0],
            },
        },
    ),
}
FAMILIES = tuple(_FAMILIES)
_BENT_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 7, "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        {
            "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 10, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6, "v_head_dim": 5, "num_local_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 7,
        },
    ),
    "llama4_text": (
        "llama4_text",
        {
            "head_dim": 8, "intermediate_size_mlp": 13, "attention_chunk_size": 6, "num_local_experts": 4,
            "no_rope_layers": [1, 0, 1], "interleave_moe_layer_step": 2, "floor_scale": 3, "attn_scale": 0.4,
        },
    ),
}  # fmt: skip
BENT_FAMILIES = tuple(_BENT_FAMILIES)
"""Whose attention has a softcap, sinks, values of another size than keys, or chunks."""


def tiny_model(
    family: str = "qwen3", dtype: torch.dtype = torch.float64, seed: int = 0, **more: Any
) -> PreTrainedModel:
    model_type, extra = {**_FAMILIES, **_BENT_FAMILIES}[family]
    torch.manual_seed(seed)
    options = {f"{part}_implementation": "eager" for part in ("attn", "experts") if family in BENT_FAMILIES}
    config = AutoConfig.for_model(model_type, **{**_COMMON, **extra, **more})
    model = AutoModelForCausalLM.from_config(config, **options)
    model.to(dtype)
    return model.train()  # as a trainer leaves it


@functools.cache
def shared_model() -> PreTrainedModel:
    """One model for all of hypothesis's examples; nobody changes it."""
    return tiny_model()


def request(
    token_ids: Sequence[int] | np.ndarray,
    new: int = 8,
    *,
    key: int = 0,
    seed: int = 0,
    temperature: float = 1.0,
    stop: tuple[int, ...] = (),
) -> Request:
    sampling = SamplingParams(new, temperature, stop)
    return Request(np.asarray(token_ids, np.int64), sampling, seed, key)


def local_engine(model: PreTrainedModel, **options: Any) -> LocalEngine:
    """The engine as training has it: stock models in fp32 run without their modules."""
    return LocalEngine(model, decoder_of=StockDecoder.of, **options)


def generate(engine: LocalEngine, requests: Sequence[Request]) -> list[Completion]:
    return asyncio.run(engine.generate(requests))


def random_tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, count)


def logits_of(model: PreTrainedModel, token_ids: np.ndarray) -> torch.Tensor:
    """The stock forward over one whole sequence, [L, V]: no cache, no padding, no mask of ours."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(token_ids)[None], use_cache=False).logits[0]


def stock_logprobs(model: PreTrainedModel, asked: Request, completion: Completion) -> np.ndarray:
    """Log-probs of a completion's tokens under the stock forward over prompt and completion."""
    sequence = np.concatenate([asked.token_ids, completion.token_ids])
    logits = logits_of(model, sequence)[len(asked.token_ids) - 1 : -1]
    logprobs = torch.log_softmax(logits / (asked.sampling.temperature or 1.0), dim=-1)
    return logprobs.gather(-1, torch.from_numpy(completion.token_ids)[:, None])[:, 0].numpy()


def naive_sample(model: PreTrainedModel, asked: Request) -> list[int]:
    """Sample alone, running the whole sequence again for every token, with the same keyed draws."""
    sequence = asked.token_ids
    base = np.array([stream_base(asked.seed, asked.rollout_key)], np.uint64)
    temperature = np.array([asked.sampling.temperature])
    sampled: list[int] = []
    while len(sampled) < asked.sampling.max_new_tokens:
        draw = uniforms(base, np.array([len(sequence)]))
        token = int(sample_tokens(logits_of(model, sequence)[-1:], temperature, draw)[0][0])
        sampled.append(token)
        sequence = np.append(sequence, token)
        if token in asked.sampling.stop_token_ids:
            break
    return sampled


def tokens_held(engine: LocalEngine) -> int:
    """Tokens whose keys and values the engine's radix tree holds now."""
    return engine._scheduler.tree.pool.used
