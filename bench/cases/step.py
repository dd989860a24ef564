"""step: one whole training step (forward, backward, AdamW) on the forest against the padded flat batch.

The flat batch runs each rollout in its own padded row through the stock Hugging Face model with SDPA, with
the LM head on trained rows only, as ours. Both compute the same weighted sum of log-probs, checked first.

    step                 rollouts of the embedded default, played by the embedded model (0.8 M parameters)
    step:long_prefix     1,000 shared tokens, 6 rollouts of 170, half of them forking halfway (3 M)
    step:many_short      400 shared tokens, 16 rollouts of 30 (3 M parameters)
    step:nothing_shared  5 rollouts of 300, nothing shared (3 M parameters)

--quick times the first one only.

ideal = arithmetic of the flat batch / arithmetic of the forest: linear multiply-adds x tokens + attention
multiply-adds x visible pairs + LM-head multiply-adds x labelled rows, each counted on its own side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from measure import Result, compare
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from mosaic_fast.components import build_components, model_folder
from mosaic_fast.config import Config
from mosaic_fast.policy import Policy
from mosaic_kernels import PackedForest, ideal_speedup, pack_forest


@dataclass(frozen=True)
class Workload:
    model: PreTrainedModel
    sequences: list[np.ndarray]
    trained: list[np.ndarray]

    @property
    def forest(self) -> PackedForest:
        return pack_forest(self.sequences, self.trained)


def _middle_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return model


def _drawn(shared: int, rollouts: int, own: int, *, fork_halfway: bool = False) -> Workload:
    """Random tokens: `shared` untrained ones, then `own` trained ones a rollout."""
    model, random = _middle_model(), np.random.default_rng(0)
    prompt = random.integers(0, 4096, shared)
    sequences, trained, first_half = [], [], random.integers(0, 4096, own // 2)
    for r in range(rollouts):
        suffix = random.integers(0, 4096, own)
        if fork_halfway and r % 2:
            suffix[: own // 2] = first_half
        sequences.append(np.concatenate([prompt, suffix]))
        trained.append(np.arange(shared + own) >= max(1, shared))
    return Workload(model, sequences, trained)


def _played() -> Workload:
    """The first rollouts of the embedded default run."""
    config = Config()
    components = build_components(config, model_folder("embedded"))
    loop = components.loop
    tasks = loop.environment.sample("train", config.rollout.prompts_per_step, 0)
    work = loop.groups(tasks, group_size=config.rollout.group_size, branching="independent", seed=0)
    rollouts = [r for group in components.run(work, version=0) for r in group]
    return Workload(components.policy.model, [r.token_ids for r in rollouts], [r.trained for r in rollouts])


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "step": _played,
    "step:long_prefix": lambda: _drawn(1_000, 6, 170, fork_halfway=True),
    "step:many_short": lambda: _drawn(400, 16, 30),
    "step:nothing_shared": lambda: _drawn(0, 5, 300),
}
QUICK = ("step",)


def forest_loss(policy: Policy, forest: PackedForest, weights: Tensor) -> Tensor:
    """Weighted sum of log-probs on the forest. weights: [T]."""
    return (policy.logprobs(forest) * weights).sum() / len(weights)


def flat_loss(model: PreTrainedModel, workload: Workload, weights: Tensor) -> Tensor:
    """The same by the stock model on the padded batch."""
    lengths = [len(s) for s in workload.sequences]
    token_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    wanted = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    padding = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    spread = torch.zeros(len(lengths), max(lengths))
    offset = 0
    for r, (sequence, mask) in enumerate(zip(workload.sequences, workload.trained, strict=True)):
        n = len(sequence)
        token_ids[r, :n] = torch.from_numpy(sequence)
        wanted[r, :n] = torch.from_numpy(mask)
        padding[r, :n] = 1
        spread[r, :n] = weights[offset : offset + n]
        offset += n
    hidden = model.get_decoder()(
        input_ids=token_ids, attention_mask=padding, use_cache=False
    ).last_hidden_state
    rows = hidden[:, :-1][wanted[:, 1:]]
    targets = token_ids[:, 1:][wanted[:, 1:]]
    head = model.get_output_embeddings()
    assert head is not None
    logprobs = -F.cross_entropy(head(rows), targets, reduction="none")
    return (logprobs * spread[:, 1:][wanted[:, 1:]]).sum() / len(weights)


def _weights(forest: PackedForest) -> Tensor:
    return torch.randn(forest.num_tokens, generator=torch.Generator().manual_seed(1))


def check(quick: bool) -> None:
    """Loss and every gradient of the forest equal the flat batch's, fp32, 1e-4 of each gradient's norm."""
    for name in QUICK if quick else WORKLOADS:
        workload = WORKLOADS[name]()
        model, forest = workload.model, workload.forest
        weights, gradients = _weights(forest), []
        policy = Policy(model)
        for loss in (forest_loss(policy, forest, weights), flat_loss(model, workload, weights)):
            model.zero_grad()
            loss.backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        for parameter, gradient in gradients[1].items():
            error = float((gradients[0][parameter] - gradient).norm() / gradient.norm().clamp_min(1e-9))
            assert error < 1e-4, f"{name}: gradient of {parameter} is off by {error:.1e}"


def ideal(workload: Workload) -> float:
    return ideal_speedup(workload.forest, workload.model.config)


def run(quick: bool) -> dict[str, Result]:
    results = {}
    for name in QUICK if quick else WORKLOADS:
        workload = WORKLOADS[name]()
        model, policy = workload.model, Policy(workload.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
        forest = workload.forest
        weights = _weights(forest)

        def train_on(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        # the forest is packed inside the timed step, as in training
        results[name] = compare(
            {
                "ours": lambda p=policy, w=workload, x=weights: train_on(lambda: forest_loss(p, w.forest, x)),
                "flat": lambda m=model, w=workload, x=weights: train_on(lambda: flat_loss(m, w, x)),
            },
            repeats=3 if quick else 5,
            ideal=ideal(workload),
            extra={
                "raw_tokens": forest.num_tokens,
                "unique_tokens": forest.num_nodes,
                "raw_over_unique": forest.num_tokens / forest.num_nodes,
                "parameters": sum(p.numel() for p in model.parameters()),
            },
        )
    return results
