"""Models and rollouts that several cases run on. Tokens are random; only their sharing matters for cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from device import Place
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mosaic_kernels import PackedForest, pack_forest

ENOUGH = 2**20  # tokens a micro-batch where nothing is to be cut
_VOCABULARY = 8192


@dataclass(frozen=True)
class Workload:
    """Rollouts and the model that is trained on them."""

    model: PreTrainedModel
    sequences: list[np.ndarray]
    trained: list[np.ndarray]
    tokens_per_microbatch: int = ENOUGH

    @property
    def forest(self) -> PackedForest:
        return pack_forest(self.sequences, self.trained)


def qwen3(layers: int = 10, hidden: int = 384, vocabulary: int = _VOCABULARY) -> Qwen3ForCausalLM:
    """A random Qwen3 model with SDPA; by default 10 layers of 384, 20 M parameters."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return model


def qwen3_5(layers: int = 8, hidden: int = 384, vocabulary: int = _VOCABULARY) -> PreTrainedModel:
    """A random Qwen3.5 text model: three of four layers are gated delta rules."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=hidden // 128,
        linear_num_value_heads=hidden // 64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def small_qwen3() -> Qwen3ForCausalLM:
    """3 layers of 256, 2.9 M parameters: a flat batch of 8,192 tokens takes seconds."""
    return qwen3(layers=3, hidden=256, vocabulary=2048)


@dataclass(frozen=True)
class Shape:
    """What a model for an accelerator is made of; the defaults are what Qwen3's small models share."""

    hidden: int
    inner: int
    layers: int = 28
    heads: int = 16
    key_heads: int = 8
    head_size: int = 128
    vocabulary: int = 151_936


QWEN3_1_7B, QWEN3_0_6B = Shape(2048, 6144), Shape(1024, 3072)


def real_qwen3(place: Place, shape: Shape = QWEN3_1_7B) -> PreTrainedModel:
    """A random model of a shape, with SDPA, made on the device in its precision."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    with place.device:
        return AutoModelForCausalLM.from_config(config, dtype=place.dtype, attn_implementation="sdpa")


def drawn(
    shared: int,
    rollouts: int,
    own: int,
    *,
    model: PreTrainedModel | None = None,
    fork_halfway: bool = False,
    depth: int = 1,
) -> Workload:
    """`shared` untrained tokens, then `own` trained ones a rollout.

    fork_halfway: every second rollout shares the first half of its own tokens with the others of its kind.
    depth: above 1 a binary tree: rollouts share depth - 1 equal runs of the own tokens in halves, quarters...
    """
    model = model or qwen3()
    rollouts_of = drawn_rollouts(
        model.config.vocab_size, shared, rollouts, own, fork_halfway=fork_halfway, depth=depth
    )
    return Workload(model, *rollouts_of)


def groups_drawn(model: PreTrainedModel, groups: int, shared: int, rollouts: int, own: int) -> Workload:
    """Several groups as `drawn`; groups share nothing."""
    found = [drawn_rollouts(model.config.vocab_size, shared, rollouts, own, seed=g) for g in range(groups)]
    return Workload(model, [s for group, _ in found for s in group], [m for _, group in found for m in group])


def drawn_rollouts(
    vocabulary: int,
    shared: int,
    rollouts: int,
    own: int,
    *,
    fork_halfway: bool = False,
    depth: int = 1,
    seed: int = 0,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and masks of `drawn`."""
    random = np.random.default_rng(seed)
    prompt = random.integers(0, vocabulary, shared)
    sequences, trained, first_half = [], [], random.integers(0, vocabulary, own // 2)
    run = own // depth
    runs: dict[tuple[int, int], np.ndarray] = {}
    for r in range(rollouts):
        suffix = random.integers(0, vocabulary, own)
        if fork_halfway and r % 2:
            suffix[: own // 2] = first_half
        for level in range(depth - 1):  # rollouts with the same leading bits of r share this run
            branch = r * 2**level // rollouts
            tokens = runs.setdefault((level, branch), random.integers(0, vocabulary, run))
            suffix[level * run : (level + 1) * run] = tokens
        sequences.append(np.concatenate([prompt, suffix]))
        trained.append(np.arange(shared + own) >= max(1, shared))
    return sequences, trained


def agent(model: PreTrainedModel | None = None) -> Workload:
    """One group of `agent_rollouts`."""
    model = model or qwen3()
    return Workload(model, *agent_rollouts(model.config.vocab_size))


def agent_rollouts(vocabulary: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and masks of 8 trajectories with the lengths of AgentDojo's: 1,700 tokens of prompt with tool
    schemas, then turns: 60 to 90 sampled tokens, an observation of 20 to 60; some fork at a turn. About 2,100
    tokens each.
    """
    random = np.random.default_rng(seed)
    prompt = random.integers(0, vocabulary, 1700)
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
            tokens = np.append(tokens, random.integers(0, vocabulary, sampled + observed))
            mask = np.append(mask, np.arange(sampled + observed) < sampled)
        sequences.append(tokens)
        trained.append(mask)
    return sequences, trained


def played() -> Workload:
    """The first rollouts of the embedded default run, played by the embedded model (0.8 M parameters)."""
    from mosaic_fast.config import Config  # what only draws tokens does without a run's packages
    from mosaic_fast.setup.build import build_setup
    from mosaic_fast.setup.model_folder import model_folder

    config = Config()
    setup = build_setup(config, model_folder("embedded"))
    loop = setup.loop
    tasks = loop.environment.sample("train", config.rollout.prompts_per_step, 0)
    work = loop.groups(tasks, group_size=config.rollout.group_size, branching="independent", seed=0)
    rollouts = [r for group in setup.run(work, version=0) for r in group]
    return Workload(setup.policy.model, [r.token_ids for r in rollouts], [r.trained for r in rollouts])
