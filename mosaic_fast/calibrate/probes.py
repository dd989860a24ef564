"""What is measured: few forests that together tell every kind of work from the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import cast

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mosaic_fast.execution import Execution
from mosaic_fast.execution.cost import work_of
from mosaic_fast.execution.schedule import Schedule
from mosaic_fast.policy import Policy
from mosaic_kernels import pack_forest
from mosaic_kernels.ideal import ModelShape


@dataclass(frozen=True)
class Probe:
    """Rollouts of `shared` common tokens and `own` others, the last `trained` of which are trained."""

    model: str  # of CONFIGS
    shared: int
    rollouts: int
    own: int
    trained: int
    budget: int
    plan: str

    def __str__(self) -> str:
        return f"{self.rollouts} x ({self.shared} + {self.own}), {self.trained}"


def _config(hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


CONFIGS: Mapping[str, Qwen3Config] = {
    "usual": _config(256, 768, 4, 4, 2, 4096),
    "narrow": _config(128, 256, 4, 2, 1, 512),  # calls of layers with hardly any weights
    "wide": _config(512, 1536, 4, 8, 4, 4096),  # many weights a call
    "keys": _config(256, 256, 2, 16, 16, 512),  # many keys and values to copy a call
    "words": _config(256, 256, 1, 4, 2, 8192),  # little but an LM head
}
PROBES = (
    Probe("narrow", 0, 8, 8, 7, 8, "flat"),
    Probe("narrow", 0, 8, 32, 31, 32, "flat"),
    Probe("wide", 0, 4, 8, 7, 8, "flat"),
    Probe("usual", 0, 16, 32, 31, 64, "flat"),
    Probe("usual", 0, 8, 128, 1, 1024, "tree"),
    Probe("usual", 0, 8, 128, 127, 1024, "tree"),
    Probe("wide", 0, 1, 256, 255, 256, "tree"),
    Probe("words", 0, 4, 128, 127, 512, "tree"),
    Probe("usual", 0, 1, 2048, 4, 2048, "tree"),
    Probe("usual", 512, 32, 16, 16, 1024, "tree"),
    Probe("usual", 512, 4, 96, 96, 704, "cut"),
    Probe("usual", 512, 4, 96, 96, 704, "held"),
    Probe("keys", 512, 8, 4, 4, 544, "tree"),
    Probe("keys", 512, 8, 4, 4, 516, "held"),
    Probe("keys", 768, 6, 16, 16, 784, "held"),
)


def random_policy(config: Qwen3Config, device: torch.device, dtype: torch.dtype) -> Policy:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    module: torch.nn.Module = model
    module.to(device=device, dtype=dtype)
    return Policy(model)


def prepared(probe: Probe) -> tuple[Execution, Schedule, tuple[float, ...]]:
    """How a probe is run, and the work [K] of that in the order of the coefficients. Random tokens."""
    config, random = CONFIGS[probe.model], np.random.default_rng(0)
    prompt = random.integers(0, config.vocab_size, probe.shared)
    length = probe.shared + probe.own
    sequences = [
        np.append(prompt, random.integers(0, config.vocab_size, probe.own)) for _ in range(probe.rollouts)
    ]
    forest = pack_forest(sequences, [np.arange(length) >= length - probe.trained] * probe.rollouts)
    shape = cast(ModelShape, config)
    execution = Execution(probe.budget, 1.0, shape, plan=probe.plan)
    schedule = execution.schedule(forest)
    return execution, schedule, astuple(work_of(schedule.parts, shape))
