"""step: one whole training step (forward, backward, AdamW) on the forest against the padded flat batch.

The flat batch runs each rollout in its own padded row through the stock Hugging Face model with SDPA, with
the LM head on trained rows only, as ours. Both compute the same weighted sum of log-probs, checked first.

    step                 rollouts of the embedded default, played by the embedded model (0.8 M parameters)
    step:long_prefix     1,500 shared tokens, 6 rollouts of 250, half of them forking halfway
    step:held            the same with 2,000 tokens a micro-batch; `cut` repeats the prefix instead
    step:many_short      300 shared tokens, 64 rollouts of 30
    step:agent           8 agent trajectories of about 2,100 tokens: 1,700 shared, turns with observations
                         between them, some forking at a turn; lengths as on AgentDojo, tokens random
    step:nothing_shared  5 rollouts of 500, nothing shared

All but the first: a Qwen3 model of 20 M parameters. --quick times the first one only.

ideal = arithmetic of the flat batch / arithmetic of the forest: linear multiply-adds x tokens + attention
multiply-adds x visible pairs + LM-head multiply-adds x labelled rows, each counted on its own side. peak is
the most memory PyTorch holds during forward and backward, beyond weights and gradients of a first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from measure import Result, compare, peak_gib
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from mosaic_fast.components import build_components, model_folder
from mosaic_fast.config import Config
from mosaic_fast.execution import Execution, Piece
from mosaic_fast.policy import Policy
from mosaic_kernels import PackedForest, ideal_speedup, pack_forest

ENOUGH = 2**20  # tokens a micro-batch where nothing is to be cut


@dataclass(frozen=True)
class Workload:
    model: PreTrainedModel
    sequences: list[np.ndarray]
    trained: list[np.ndarray]
    tokens_per_microbatch: int = ENOUGH

    @property
    def forest(self) -> PackedForest:
        return pack_forest(self.sequences, self.trained)


def _model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return model


def _drawn(shared: int, rollouts: int, own: int, *, fork_halfway: bool = False) -> Workload:
    """Random tokens: `shared` untrained ones, then `own` trained ones a rollout."""
    random = np.random.default_rng(0)
    prompt = random.integers(0, 8192, shared)
    sequences, trained, first_half = [], [], random.integers(0, 8192, own // 2)
    for r in range(rollouts):
        suffix = random.integers(0, 8192, own)
        if fork_halfway and r % 2:
            suffix[: own // 2] = first_half
        sequences.append(np.concatenate([prompt, suffix]))
        trained.append(np.arange(shared + own) >= max(1, shared))
    return Workload(_model(), sequences, trained)


def _agent() -> Workload:
    """A prompt with tool schemas, then turns: 60 to 90 sampled tokens, an observation of 20 to 60."""
    random = np.random.default_rng(0)
    prompt = random.integers(0, 8192, 1700)
    sequences: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    for r in range(8):
        tokens, mask = prompt, np.zeros(len(prompt), np.bool_)
        if r % 2:  # forks from its neighbour after the first turn or two
            kept = len(prompt) + int(random.integers(60, 200))
            tokens, mask = sequences[-1][:kept], trained[-1][:kept]
        target = int(random.integers(1950, 2250))
        while len(tokens) < target:
            sampled, observed = int(random.integers(60, 91)), int(random.integers(20, 61))
            tokens = np.append(tokens, random.integers(0, 8192, sampled + observed))
            mask = np.append(mask, np.arange(sampled + observed) < sampled)
        sequences.append(tokens)
        trained.append(mask)
    return Workload(_model(), sequences, trained)


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
    "step:long_prefix": lambda: _drawn(1_500, 6, 250, fork_halfway=True),
    "step:held": lambda: replace(_drawn(1_500, 6, 250, fork_halfway=True), tokens_per_microbatch=2_000),
    "step:many_short": lambda: _drawn(300, 64, 30),
    "step:agent": _agent,
    "step:nothing_shared": lambda: _drawn(0, 5, 500),
}
VARIANTS, QUICK = tuple(WORKLOADS), ("step",)


def forest_backward(workload: Workload, policy: Policy, weights: Tensor, plan: str = "auto") -> Execution:
    """Gradient of the weighted sum of log-probs, from packing the forest on. weights: [T]."""
    forest = workload.forest
    execution = Execution(workload.tokens_per_microbatch, 1.0, workload.model.config, plan=plan)

    def loss_of(piece: Piece) -> Tensor:
        return (piece.logprobs * weights[piece.source]).sum() / len(weights)

    execution.backward(policy, execution.schedule(forest), loss_of)
    return execution


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


def check(name: str, quick: bool) -> None:
    """Loss and every gradient of the forest equal the flat batch's, fp32, 1e-4 of each gradient's norm."""
    workload = WORKLOADS[name]()
    model, weights, gradients = workload.model, _weights(workload.forest), []
    policy = Policy(model)
    for backward in (
        lambda: forest_backward(workload, policy, weights),
        lambda: flat_loss(model, workload, weights).backward(),
    ):
        model.zero_grad()
        backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for parameter, gradient in gradients[1].items():
        error = float((gradients[0][parameter] - gradient).norm() / gradient.norm().clamp_min(1e-9))
        assert error < 1e-4, f"gradient of {parameter} is off by {error:.1e}"


def train_on(optimizer: torch.optim.Optimizer, backward: Callable[[], None]) -> None:
    optimizer.zero_grad()
    backward()
    optimizer.step()


def ideal(workload: Workload) -> float:
    return ideal_speedup(workload.forest, workload.model.config)


def run(name: str, quick: bool) -> Result:
    workload = WORKLOADS[name]()
    model, policy = workload.model, Policy(workload.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    forest = workload.forest
    weights = _weights(forest)

    def ours(plan: str = "auto") -> None:
        forest_backward(workload, policy, weights, plan)  # packed inside the timed step, as in training

    def flat() -> None:
        flat_loss(model, workload, weights).backward()

    contenders = {"ours": ours, "flat": flat}
    if name == "step:held":
        contenders["cut"] = partial(ours, "cut")
    figures = forest_backward(workload, policy, weights).figures()
    return compare(
        {one: partial(train_on, optimizer, work) for one, work in contenders.items()},
        repeats=3 if quick or name != "step" else 5,
        ideal=ideal(workload),
        extra={
            "raw_tokens": forest.num_tokens,
            "unique_tokens": forest.num_nodes,
            "raw_over_unique": forest.num_tokens / forest.num_nodes,
            "parameters": sum(p.numel() for p in model.parameters()),
            "peak_gib": peak_gib(ours),
            "flat_peak_gib": peak_gib(flat),
            **{key: value for key, value in figures.items() if key.startswith("tree/")},
        },
    )
