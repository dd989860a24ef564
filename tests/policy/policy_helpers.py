"""Tiny models of each family, forests to run them on, and the oracle: every rollout alone, stock model."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from mosaic_kernels import PackedForest, pack_forest

VOCAB = 23


def _sizes(**changes: object) -> dict[str, object]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 20,
        "intermediate_size": 13,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }


_SLIDING = {"use_sliding_window": True, "sliding_window": 3}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
}
LONGROPE_SWITCH = 6  # rollouts above this length use the long factors

CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config.from_dict(_sizes(tie_word_embeddings=True, hidden_size=24)),
    "qwen2-window": Qwen2Config.from_dict(
        _sizes(hidden_size=24, num_hidden_layers=3, max_window_layers=1, **_SLIDING)
    ),
    "qwen3": Qwen3Config.from_dict(_sizes(head_dim=6, tie_word_embeddings=True)),
    "qwen3-window": Qwen3Config.from_dict(
        _sizes(
            head_dim=10,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            **_SLIDING,
        )
    ),
    "phi3": Phi3Config.from_dict(
        _sizes(hidden_size=32, rope_parameters={"rope_theta": 100.0, "partial_rotary_factor": 0.5})
    ),
    "phi3-window": Phi3Config.from_dict(_sizes(hidden_size=24, sliding_window=4, tie_word_embeddings=True)),
    "llama": LlamaConfig.from_dict(
        _sizes(num_attention_heads=6, num_key_value_heads=3, hidden_size=36, head_dim=6)
    ),
    "llama-bias": LlamaConfig.from_dict(
        _sizes(hidden_size=24, attention_bias=True, mlp_bias=True, rope_parameters=_LLAMA3)
    ),
    "longrope": Phi3Config.from_dict(
        _sizes(hidden_size=32, rope_parameters=_LONGROPE, original_max_position_embeddings=LONGROPE_SWITCH)
    ),
}

FAMILIES = [case for case in CONFIGS if case != "longrope"]
"""Those whose positions do not depend on how long the longest rollout is."""


def tiny_model(case: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model with every weight random, biases and norms included; in fp64 its norms compute in fp64."""
    config = type(CONFIGS[case]).from_dict(CONFIGS[case].to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.3 * noise)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = types.MethodType(_rms_norm_fp64, module)
    return model.train()


@functools.cache
def fp64_model(case: str) -> PreTrainedModel:
    """One for all of hypothesis's examples; nobody changes it."""
    return tiny_model(case)


def _rms_norm_fp64(self: Any, hidden_states: Tensor) -> Tensor:
    """transformers' RMSNorm without its detour through fp32, which limits agreement to 1e-6."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def decoder(model: PreTrainedModel) -> Any:
    """The model inside the causal LM: embed_tokens, layers, norm."""
    return model.get_decoder()


@dataclass(frozen=True)
class Rollouts:
    sequences: list[np.ndarray]
    trained: list[np.ndarray]

    def pack(self) -> PackedForest:
        return pack_forest(self.sequences, self.trained)


@st.composite
def rollouts(draw: st.DrawFn, max_rollouts: int = 6) -> Rollouts:
    """Duplicates, strict prefixes, one-token and empty rollouts, several trees, a mask a rollout."""
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(0, max_rollouts))):
        stem: list[int] = []
        if sequences and draw(st.integers(0, 3)):
            other = sequences[draw(st.integers(0, len(sequences) - 1))]
            stem = other[: draw(st.integers(0, len(other)))]
        sequences.append(stem + draw(st.lists(st.integers(0, 3), max_size=7)))
    masks = [draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for s in sequences]
    return Rollouts(
        [np.array(s, np.int64) for s in sequences],
        [np.array([False, *m[1:]][: len(m)], np.bool_) for m in masks],
    )


def example_rollouts(seed: int = 0, length: int = 12) -> Rollouts:
    """Two trees, forks, a duplicate, a strict prefix, a one-token and an empty rollout."""
    rng = np.random.default_rng(seed)
    trunk, other = rng.integers(0, VOCAB, length), rng.integers(0, VOCAB, length // 2)
    sequences = [np.concatenate([trunk[:k], rng.integers(0, VOCAB, length - k)]) for k in (5, 8, 8, length)]
    sequences += [trunk, trunk[:4], other, np.concatenate([other, [1, 2]]), trunk[:1], trunk[:0]]
    return Rollouts(sequences, [(rng.random(len(s)) < 0.7) & (np.arange(len(s)) > 0) for s in sequences])


def stock_logprobs(
    model: PreTrainedModel, data: Rollouts, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:  # [T], [T]
    """Log-probs and entropies from each rollout alone through the stock model; zero where not trained."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    logprobs, entropies = [torch.zeros(0, dtype=dtype)], [torch.zeros(0, dtype=dtype)]
    for sequence, trained in zip(data.sequences, data.trained, strict=True):
        if not len(sequence):
            continue
        ids, mask = torch.from_numpy(sequence)[None], torch.from_numpy(trained)
        logits = model(input_ids=ids, use_cache=False).logits[0].to(dtype) / temperature
        table = logits.log_softmax(-1)[:-1]
        first = torch.zeros(1, dtype=dtype)
        logprobs.append(torch.cat([first, table.gather(1, ids[0, 1:, None])[:, 0]]) * mask)
        entropies.append(torch.cat([first, -(table.exp() * table).sum(-1)]) * mask)
    return torch.cat(logprobs), torch.cat(entropies)


def loss_weights(num_tokens: int) -> tuple[Tensor, Tensor]:  # [T], [T] fp64
    """A different coefficient for each token's log-prob and entropy, so that no sum hides a swap."""
    generator = torch.Generator().manual_seed(num_tokens)
    weights = torch.randn(2, num_tokens, generator=generator, dtype=torch.float64)
    return weights[0], weights[1]


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient, zero where the loss does not reach it."""
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_gradients_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to each parameter's own norm, with a floor for gradients that are zero but for rounding."""
    floor = 1e-4 * max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        error = float((got[name] - gradient).norm())
        assert error <= tolerance * max(float(gradient.norm()), floor), f"{name}: error {error:.2e}"
