"""The cold start's training: one run with one warm-up and one decay, by Muon.

Muon is momentum whose every update is made a nearly orthogonal matrix (Jordan et al., 2024). This one keeps
the bits of the shipped weights; torch.optim.Muon orthogonalises in bfloat16, a matrix at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from mosaic_fast.policy import Policy
from mosaic_kernels import pack_forest
from tools.warmstart.arguments import Recipe
from tools.warmstart.examples import Example, ExampleMaker

_QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan's Newton-Schulz iteration
_ITERATIONS = 5


class Muon:
    """Updates weight matrices; matrices of one shape are orthogonalised together."""

    def __init__(
        self, matrices: Iterable[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        self._groups = list(by_shape.values())
        self._velocity = [torch.zeros(len(group), *group[0].shape) for group in self._groups]
        self._momentum, self._weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients in place."""
        for group, velocity in zip(self._groups, self._velocity, strict=True):
            gradients = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in group])
            velocity.lerp_(gradients, 1.0 - self._momentum)
            updates = orthogonalise(torch.lerp(gradients, velocity, self._momentum))
            rows, columns = group[0].shape
            scale = max(1.0, rows / columns) ** 0.5
            for parameter, update in zip(group, updates, strict=True):
                parameter.mul_(1.0 - lr * self._weight_decay).add_(update, alpha=-lr * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values end near 1.

    matrices: [K, M, N] fp32. Returns [K, M, N].
    """
    a, b, c = _QUINTIC
    transpose = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if transpose else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transpose else x


CONTEXT = 1024
_POOL_BATCHES = 8  # batches made at once and sorted by length, so that little is padded


def build_model(recipe: Recipe, vocab_size: int, pad: int, eos: int) -> Qwen3ForCausalLM:
    """A small Qwen3 with random weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        initializer_range=recipe.initializer_range,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def train(
    model: Qwen3ForCausalLM, maker: ExampleMaker, recipe: Recipe, on_step: Callable[[int, float, int], None]
) -> None:
    """Train in place. on_step(step, loss, tokens) is called after each of the recipe's steps."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon(matrices)
    adamw = torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    system_prompt, policy = maker.system_prompt(), Policy(model.train())
    for step, batch in enumerate(_batches(maker, recipe)):
        rate = _rate(step, recipe)
        for group in adamw.param_groups:
            group["lr"] = recipe.lr * rate
        loss = batch_loss(policy, system_prompt, batch)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(recipe.matrix_lr * rate)
        adamw.step()
        on_step(step, loss.item(), sum(len(example.token_ids) for example in batch))


def batch_loss(policy: Policy, system_prompt: list[int], batch: list[Example]) -> Tensor:
    """Mean negative log-likelihood of the trained tokens, on a forest: the system prompt is computed once."""
    before = [False] * len(system_prompt)
    forest = pack_forest(
        [np.array(system_prompt + example.token_ids) for example in batch],
        [np.array(before + example.trained) for example in batch],
    )
    return -policy.logprobs(forest).sum() / int(forest.trained.sum())


def _batches(maker: ExampleMaker, recipe: Recipe) -> Iterator[list[Example]]:
    rng = random.Random(recipe.seed)
    for first in range(0, recipe.steps, _POOL_BATCHES):
        progress = first / recipe.steps
        pool = [_example(maker, recipe, progress, rng) for _ in range(recipe.batch * _POOL_BATCHES)]
        pool.sort(key=lambda example: len(example.token_ids))
        batches = [pool[i : i + recipe.batch] for i in range(0, len(pool), recipe.batch)]
        rng.shuffle(batches)
        yield from batches[: recipe.steps - first]


def _example(maker: ExampleMaker, recipe: Recipe, progress: float, rng: random.Random) -> Example:
    if progress < recipe.drills_until:
        recall, arguments = 0.25, 0.6
    elif progress < recipe.some_drills_until:
        recall, arguments = 0.05, 0.15
    else:
        recall, arguments = 0.0, 0.0
    draw = rng.random()
    if draw < recall:
        return maker.recall_drill(rng)
    if draw < recall + arguments:
        return maker.argument_drill(rng)
    return maker.trajectory(rng)


def _rate(step: int, recipe: Recipe) -> float:
    """Share of the full learning rate at a step."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    left = 1.0 - step / recipe.steps
    return warmup * min(1.0, max(recipe.final_lr_frac, left / recipe.decay_frac))
