"""A small model, the run that trains it on a full micro-batch, and what that run really takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedConfig, Qwen2Config, Qwen3Config

from mosaic_fast.config import Config
from mosaic_fast.learner.learner import Learner, Reference
from mosaic_fast.learner.lora import Lora
from mosaic_fast.learner.step_batch import StepBatch, judged_pairs
from mosaic_fast.losses.credit import find_forks
from mosaic_fast.policy import Policy
from mosaic_fast.policy.layout import checkpoint_activations
from mosaic_fast.setup.memory import estimate_memory
from mosaic_fast.setup.memory.estimate import PHASES
from mosaic_kernels import pack_forest

ROLLOUTS, LENGTH = 4, 160
TOLERANCE = 0.05
SIZES: dict[str, object] = {
    "vocab_size": 1500,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SHAPES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config.from_dict(SIZES),
    "qwen3": Qwen3Config.from_dict({**SIZES, "head_dim": 32, "tie_word_embeddings": True}),
    "phi3": Phi3Config.from_dict(SIZES),
}


@dataclass(frozen=True)
class Variant:
    """What decides a run's memory."""

    family: str
    dtype: str = "float32"
    checkpointed: bool = False
    lora_rank: int = 0
    loss: str = "grpo"
    microbatch: int = ROLLOUTS * LENGTH

    def config(self, folder: Path) -> Config:
        """The run's configuration, its model described in `folder`."""
        SHAPES[self.family].save_pretrained(folder)
        return Config.model_validate(
            {
                "model": {
                    "path": str(folder),
                    "dtype": self.dtype,
                    "device": "cpu",
                    "activation_checkpointing": self.checkpointed,
                    "lora_rank": self.lora_rank,
                },
                "rollout": {"prompts_per_step": 2, "group_size": ROLLOUTS, "max_rollout_tokens": LENGTH},
                "forest": {"tokens_per_microbatch": self.microbatch},
                "optim": {"epochs": 1},
                "loss": {"name": self.loss},
            }
        )


def learner_of(variant: Variant, config: Config) -> Learner:
    """The learner of that run, after its first update: its optimiser has its averages."""
    torch.manual_seed(0)
    dtype = getattr(torch, variant.dtype)
    shape = SHAPES[variant.family]
    model = AutoModelForCausalLM.from_config(type(shape).from_dict(shape.to_dict()), dtype=dtype).train()
    lora = Lora(model, config.model, 0) if variant.lora_rank else None
    if variant.checkpointed:
        checkpoint_activations(model)
    reference = None
    if config.loss.needs_reference:
        other = AutoModelForCausalLM.from_config(type(shape).from_dict(shape.to_dict()), dtype=dtype)
        frozen = Policy(other.requires_grad_(False).eval())
        reference = Reference(frozen) if lora is None else Reference(Policy(model), lora.off)
    learner = Learner(Policy(model), reference, config)
    learner.update(step(shared=0), 0)
    return learner


def step(shared: int) -> StepBatch:
    """Two groups whose rollouts share their first tokens, and are trained but for them and their first."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1500, shared) for _ in range(2)]
    sequences = [
        np.append(prompt, rng.integers(0, 1500, LENGTH - shared))
        for prompt in prompts
        for _ in range(ROLLOUTS)
    ]
    count = len(sequences)
    pairs, preference = judged_pairs([np.full((ROLLOUTS, ROLLOUTS), 0.5)] * 2)
    return StepBatch(
        forest=pack_forest(sequences, [np.arange(LENGTH) >= max(1, shared)] * count),
        rollout_logprobs=np.zeros(count * LENGTH, np.float32),
        advantages=np.array([1.0, -1.0, 0.5, -0.5] * 2),
        returns=np.zeros(count),
        forks=find_forks([LENGTH] * count, [-1] * count, [0] * count),
        pairs=pairs,
        preference=preference,
    )


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that PyTorch holds during `work`, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    live = peak = 0
    for event in sorted(
        (e for e in results.events() if e.name() == "[memory]"), key=lambda one: one.start_ns()
    ):
        live += event.nbytes()  # pyrefly: ignore [missing-attribute]  # torch's stub lacks it
        peak = max(peak, live)
    return peak


def update_is_as_estimated(variant: Variant, folder: Path) -> None:
    """Weights, copies and averages to the byte; the height of an update over micro-batches to 5%."""
    config = variant.config(folder)
    estimate = estimate_memory(config)
    learner = learner_of(variant, config)
    always = sum(part.bytes for part in estimate.components if part.phases == PHASES)
    model, adamw = learner.policy.model, learner.optimizer.adamw
    there = [*model.parameters(), *learner.optimizer._masters.values()]
    there += [t for state in adamw.state.values() for t in state.values() if t.ndim]
    if learner.reference is not None and not variant.lora_rank:
        there += learner.reference.policy.model.parameters()
    assert always == sum(tensor.nbytes for tensor in there)
    assert estimate.parameters == sum(p.numel() for p in model.parameters())
    assert estimate.trained == sum(p.numel() for p in learner.optimizer.weights)

    held = sum(part.bytes for part in estimate.components if part.name == "held prefixes")
    expected = estimate.total("update") - always - held  # nothing is held where nothing is shared
    batch = step(shared=0)
    assert peak_bytes(lambda: learner.update(batch, 1)) == pytest.approx(expected, rel=TOLERANCE)
