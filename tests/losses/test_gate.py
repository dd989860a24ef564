"""gate_contrast: in expectation over all that is drawn, the gradient is that of the expected reward."""

import itertools
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from mosaic_fast.config import Config, ForestConfig, LossConfig, ModelConfig, OptimConfig, RolloutConfig
from mosaic_fast.learner.learner import Learner
from mosaic_fast.losses import LossBatch, SurrogateLoss
from mosaic_fast.losses.gate import GatedLoss, Gates, GateSides, log_one_minus_exp
from mosaic_fast.policy import Policy
from tests.learner.flat_oracle import VOCAB, Case
from tests.policy.policy_helpers import tiny_model

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
    batch = LossBatch(
        old_logprobs=logprobs.detach(),
        reference_logprobs=None,
        advantages=torch.from_numpy(np.repeat(advantages, 4)),
        weights=torch.from_numpy(gates.without_tags()),
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


def test_the_learners_gradient_is_the_formula_on_each_rollout_alone_however_the_forest_is_cut():
    """A trunk that skipped, with two siblings that opened and one that skipped, beside an ordinary group."""
    rng = np.random.default_rng(3)
    trunk = rng.integers(0, VOCAB, 9)
    at, tag = 5, np.array([20, 21])
    tails = [trunk[at:], *(rng.integers(0, 18, 4) for _ in range(3))]
    opened, skipped = (1, 3), (0, 2)
    sequences = [
        np.concatenate([trunk[:at], tag, tail]) if r in opened else np.concatenate([trunk[:at], tail])
        for r, tail in enumerate(tails)
    ]
    sequences += [rng.integers(0, VOCAB, 6), rng.integers(0, VOCAB, 7)]
    advantages = np.array([0.9, -0.3, 0.2, -0.8, 1.0, -1.0])
    trained = [np.arange(len(s)) >= 2 for s in sequences]
    case = Case(
        sequences=sequences,
        trained=trained,
        parents=[-1, 0, 0, 0, -1, -1],
        fork_positions=[0, at, at, at, 0, 0],
        groups=[[0, 1, 2, 3], [4, 5]],
        preferences=[np.full((4, 4), 0.5), np.full((2, 2), 0.5)],
        advantages=advantages,
        returns=advantages,
        rollout_logprobs=[np.zeros(len(s), np.float32) for s in sequences],
    )
    batch = replace(case.batch(), gates=(GateSides(at, 2, opened, skipped),))

    model = tiny_model("qwen3")
    total = torch.zeros((), dtype=torch.float64)
    flat = []
    for ids in sequences:
        logits = model(torch.from_numpy(ids)[None]).logits[0, :-1] / 0.7
        flat.append(torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids)[1:, None])[:, 0])
    log_p = flat[1][at - 1 : at + 1].sum()  # entry t - 1 is token t
    p = log_p.detach().exp()
    log_skip = torch.log1p(-log_p.exp())
    open_gain, skip_gain = advantages[list(opened)].mean(), advantages[list(skipped)].mean()
    for r in range(4):
        total = total + (p * open_gain + (1 - p) * skip_gain) * flat[r][1 : at - 1].sum()
    total = total + 4 * (p * open_gain * log_p + (1 - p) * skip_gain * log_skip)
    for r in opened:
        total = total + 4 * p / 2 * advantages[r] * flat[r][at + 1 :].sum()
    for r in skipped:
        total = total + 4 * (1 - p) / 2 * advantages[r] * (flat[r][at - 1 :].sum() - log_skip)
    for r in (4, 5):
        total = total + advantages[r] * flat[r][1:].sum()
    (-total / sum(int(t.sum()) for t in trained)).backward()
    expected = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    for budget in (64, 16):
        model = tiny_model("qwen3")
        config = Config(
            model=ModelConfig(path="unused"),
            rollout=RolloutConfig(
                max_rollout_tokens=16,
                max_step_tokens=8,
                temperature=0.7,
                branching="fork_at_check",
                gate_contrast=True,
            ),
            forest=ForestConfig(tokens_per_microbatch=budget),
            loss=LossConfig(kl_weight=0.0),
            optim=OptimConfig(epochs=1, grad_clip=1e9),
        )
        seen: dict[str, torch.Tensor] = {}
        learner = Learner(Policy(model), None, config)

        def record(*_: object, model: PreTrainedModel = model, seen: dict[str, torch.Tensor] = seen) -> None:
            seen |= {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

        learner.optimizer.adamw.register_step_pre_hook(record)
        figures = learner.update(batch, 0)
        assert figures["policy/gate_open"] == pytest.approx(float(p))
        for name, gradient in expected.items():
            torch.testing.assert_close(seen[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rollout": {"gate_contrast": True}}, "needs rollout.branching = 'fork_at_check'"),
        (
            {
                "rollout": {"gate_contrast": True, "branching": "fork_at_check"},
                "forest": {"credit": "mean"},
            },
            "needs forest.credit = 'sum', it is 'mean'",
        ),
        (
            {"rollout": {"gate_contrast": True, "branching": "fork_at_check"}, "loss": {"name": "gspo"}},
            "grpo, dapo or dr_grpo",
        ),
    ],
)
def test_what_gate_contrast_does_not_go_with_is_named(change: dict, named: str):
    with pytest.raises(ValueError, match=re.escape(named)):
        Config.model_validate(change)
