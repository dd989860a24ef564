"""gate_contrast: in expectation over all that is drawn, the gradient is that of the expected reward."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mosaic_fast.gate import GatedLoss, Gates, GateSides, log_one_minus_exp
from mosaic_fast.loss import LossBatch, SurrogateLoss

TAG = (2, 3)
"""Two tokens; the first also begins another action, 2 4."""
ABOVE, FIRST, SECOND, LAST = (0, 1), (2, 5), {2: (3, 4), 5: (3, 6)}, (0, 1)

Path = tuple[int, ...]


@dataclass
class TablePolicy:
    """A distribution for every prefix: above the gate, two tokens at it, one below."""

    logits: dict[Path, torch.Tensor]

    @staticmethod
    def choices(prefix: Path) -> Path:
        return (ABOVE, FIRST, SECOND.get(prefix[-1], ()) if len(prefix) == 2 else (), LAST)[len(prefix)]

    @classmethod
    def random(cls, seed: int) -> "TablePolicy":
        generator = torch.Generator().manual_seed(seed)
        prefixes: list[Path] = [()]
        for prefix in prefixes:
            if len(prefix) < 3:
                prefixes += [(*prefix, token) for token in cls.choices(prefix)]
        return cls({p: torch.randn(2, generator=generator, dtype=torch.float64) for p in prefixes})

    def logprobs(self, path: Path) -> torch.Tensor:  # [4]
        steps = [
            torch.log_softmax(self.logits[path[:i]], 0)[self.choices(path[:i]).index(token)]
            for i, token in enumerate(path)
        ]
        return torch.stack(steps)

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(value, list(self.logits.values()), allow_unused=True)
        return torch.cat([torch.zeros(2, dtype=torch.float64) if g is None else g for g in grads])


PATHS: list[Path] = [(a, f, s, last) for a in ABOVE for f in FIRST for s in SECOND[f] for last in LAST]


def opens(path: Path) -> bool:
    return path[1:3] == TAG


def loss_of_group(policy: TablePolicy, leaves: list[Path], rewards: dict[Path, float]) -> torch.Tensor:
    """The gated loss of one trunk with its siblings, each weighing 1 a token."""
    opened = tuple(i for i, leaf in enumerate(leaves) if opens(leaf))
    skipped = tuple(i for i, leaf in enumerate(leaves) if not opens(leaf))
    logprobs = torch.cat([policy.logprobs(leaf) for leaf in leaves])
    count = len(logprobs)
    advantages = np.array([rewards[leaf] for leaf in leaves])
    gates = Gates((GateSides(1, 2, opened, skipped),), np.arange(0, count + 1, 4), advantages, np.ones(count))
    weights = torch.ones(count, dtype=torch.float64)
    weights[gates.tag_tokens()] = 0.0
    batch = LossBatch(
        start_logprobs=logprobs.detach(),
        reference_logprobs=None,
        advantages=torch.from_numpy(np.repeat(advantages, 4)),
        weights=weights,
    )
    loss = gates.loss(SurrogateLoss(), np.arange(count), torch.device("cpu"))
    assert isinstance(loss, GatedLoss)
    return loss(logprobs, batch)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("siblings", [1, 2])
def test_the_expected_gradient_is_that_of_the_expected_reward(seed: int, siblings: int):
    """Every trunk, and every draw of its siblings on their side, is enumerated with its probability."""
    policy = TablePolicy.random(seed)
    for logits in policy.logits.values():
        logits.requires_grad_()
    rng = np.random.default_rng(seed)
    rewards = {path: float(rng.normal()) for path in PATHS}
    probability = {path: float(policy.logprobs(path).detach().sum().exp()) for path in PATHS}
    expected_reward = sum(policy.logprobs(path).sum().exp() * rewards[path] for path in PATHS)
    exact = policy.gradient(torch.as_tensor(expected_reward))

    expected = torch.zeros_like(exact)
    for trunk in PATHS:
        # The first sibling takes the other side, the second the trunk's own, as the agent loop has it.
        sides = [opens(trunk) == bool(i % 2) for i in range(siblings)]
        drawn = []
        for side in sides:
            possible = [p for p in PATHS if p[0] == trunk[0] and opens(p) == side]
            total = sum(probability[p] for p in possible)
            drawn.append([(p, probability[p] / total) for p in possible])
        for combination in itertools.product(*drawn):
            chance = probability[trunk] * float(np.prod([c for _, c in combination]))
            leaves = [trunk, *(p for p, _ in combination)]
            expected += chance * policy.gradient(loss_of_group(policy, leaves, rewards))
    # Above, at and below the gate, each prefix by itself.
    torch.testing.assert_close(-expected / (1 + siblings), exact, rtol=1e-12, atol=1e-12)
    assert exact.reshape(-1, 2).norm(dim=1).min() > 1e-6, "no part is right because there is nothing to learn"


def test_without_a_skip_the_gate_gets_no_gradient_of_its_own():
    policy = TablePolicy.random(1)
    for logits in policy.logits.values():
        logits.requires_grad_()
    leaf = (0, *TAG, 1)
    loss = loss_of_group(policy, [leaf, leaf], dict.fromkeys(PATHS, 1.0))
    loss.backward()
    at_gate = policy.logits[(0,)].grad
    assert at_gate is None or not at_gate.any()
    below = policy.logits[(0, *TAG)].grad
    assert below is not None
    assert below.any()


@pytest.mark.parametrize("p", [1e-3, 0.3, 0.7, 1 - 1e-9])
def test_log_one_minus_exp_does_not_cancel(p: float):
    log_p = torch.tensor(p, dtype=torch.float64).log()
    torch.testing.assert_close(
        log_one_minus_exp(log_p), torch.tensor(1.0 - p, dtype=torch.float64).log(), rtol=1e-6, atol=0
    )


def test_log_one_minus_exp_is_finite_with_its_gradient_at_certainty():
    log_p = torch.zeros((), requires_grad=True)
    value = log_one_minus_exp(log_p)
    value.backward()
    assert torch.isfinite(value)
    assert log_p.grad is not None
    assert torch.isfinite(log_p.grad)
