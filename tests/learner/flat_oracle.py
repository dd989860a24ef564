"""The learner's oracle: each rollout alone through the stock model, and every formula again, plainly."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from mosaic_fast.config import Config, LossSettings
from mosaic_fast.learner.step_batch import StepBatch, judged_pairs
from mosaic_fast.losses.credit import find_forks
from mosaic_kernels import pack_forest

VOCAB = 23


@dataclass(frozen=True)
class Case:
    """Rollouts of a step with their forks and judgements, as lists."""

    sequences: list[np.ndarray]
    trained: list[np.ndarray]
    parents: list[int]
    fork_positions: list[int]
    groups: list[list[int]]  # consecutive rollouts
    preferences: list[np.ndarray]
    advantages: np.ndarray
    returns: np.ndarray
    rollout_logprobs: list[np.ndarray]

    def batch(self) -> StepBatch:
        pairs, preference = judged_pairs(self.preferences)
        return StepBatch(
            forest=pack_forest(self.sequences, self.trained),
            rollout_logprobs=np.concatenate(self.rollout_logprobs),
            advantages=self.advantages,
            returns=self.returns,
            forks=find_forks([len(s) for s in self.sequences], self.parents, self.fork_positions),
            pairs=pairs,
            preference=preference,
        )


@functools.lru_cache
def forked_case(seed: int = 0) -> Case:
    """A trunk, a fork of it, a fork of the fork, one that agrees by chance, one apart; and a group of ties.

    The trunk has an untrained middle; one rollout ends in an observation that nothing is trained after.
    """
    rng = np.random.default_rng(seed)
    trunk = rng.integers(0, VOCAB, 12)
    fork = np.concatenate([trunk[:6], rng.integers(0, VOCAB, 5)])
    nested = np.concatenate([fork[:9], rng.integers(0, VOCAB, 4)])
    early = np.concatenate([fork[:4], rng.integers(0, VOCAB, 4)])  # forked from the fork, inside the trunk
    by_chance = np.concatenate([trunk[:8], rng.integers(0, VOCAB, 3)])
    other = rng.integers(0, VOCAB, 7)
    sequences = [trunk, fork, nested, early, by_chance, other, np.append(other[:5], [1, 2, 3]), other[:4]]
    masks = [np.arange(len(s)) >= 3 for s in sequences]
    for r, untrained in ((0, slice(5, 7)), (4, slice(5, 7)), (2, slice(11, 13)), (6, slice(7, 8))):
        masks[r][untrained] = False
    masks[1][5:6] = masks[2][5:6] = masks[0][5:6]  # inherited with the token
    groups = [[0, 1, 2, 3, 4], [5, 6, 7]]
    better = rng.choice([0.0, 0.5, 1.0, 0.7], (5, 5))
    preferences = [np.triu(better, 1) + np.tril(1 - better.T, -1) + 0.5 * np.eye(5), np.full((3, 3), 0.5)]
    return Case(
        sequences=sequences,
        trained=masks,
        parents=[-1, 0, 1, 1, -1, -1, -1, -1],
        fork_positions=[0, 6, 9, 4, 0, 0, 0, 0],
        groups=groups,
        preferences=preferences,
        advantages=np.array([1.2, -0.7, 0.4, 0.9, -1.8, 0.0, 0.0, 0.0]),
        returns=np.array([3.0, 1.0, 2.0, 2.5, 0.5, 2.0, 2.0, 2.0]),
        rollout_logprobs=[np.zeros(len(s), np.float32) for s in sequences],
    )


def alone(model: PreTrainedModel, case: Case, temperature: float) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and entropies [L_r] of every token of every rollout, each run alone; 0 at the first."""
    logprobs, entropies = [], []
    for sequence in case.sequences:
        ids = torch.from_numpy(sequence)[None]
        table = (model(input_ids=ids, use_cache=False).logits[0] / temperature).log_softmax(-1)[:-1]
        first = table.new_zeros(1)
        logprobs.append(torch.cat([first, table.gather(1, ids[0, 1:, None])[:, 0]]))
        entropies.append(torch.cat([first, -(table.exp() * table).sum(-1)]))
    return logprobs, entropies


def sampler_of(case: Case, rollout: int, token: int) -> int:
    """The rollout that sampled a token, by walking up."""
    while case.parents[rollout] >= 0 and token < case.fork_positions[rollout]:
        rollout = case.parents[rollout]
    return rollout


def holders(case: Case, rollout: int, token: int) -> list[int]:
    """The rollouts that hold the very token, sampled once, that this rollout holds."""
    sampler = sampler_of(case, rollout, token)
    return [
        r
        for r, sequence in enumerate(case.sequences)
        if token < len(sequence) and sampler_of(case, r, token) == sampler
    ]


def credit_of(case: Case, mode: str, rollout: int, token: int) -> tuple[float, float]:
    """(weight, advantage) of one rollout token, from the definition."""
    holding = holders(case, rollout, token)
    sampled_here = sampler_of(case, rollout, token) == rollout
    if mode == "sum":
        return 1.0, case.advantages[rollout]
    if mode == "mean":
        return 1.0 / len(holding), case.advantages[rollout]
    if mode == "first":
        return float(sampled_here), case.advantages[rollout]
    earlier = [h for t in range(token) if len(h := holders(case, rollout, t)) > len(holding)]
    if not earlier:
        return float(sampled_here), 0.0
    above = earlier[-1]  # who held the token just before the nearest fork
    return float(sampled_here), float(np.mean(case.returns[holding]) - np.mean(case.returns[above]))


def flat_loss(
    case: Case,
    config: Config,
    policy: list[Tensor],
    entropies: list[Tensor],
    start: list[Tensor],
    reference: list[Tensor],
) -> Tensor:
    """The configured loss of all rollouts, summed token by token."""
    loss, own = config.loss, config.loss.settings
    credit = [
        [credit_of(case, config.forest.credit, r, t) if mask[t] else (0.0, 0.0) for t in range(len(mask))]
        for r, mask in enumerate(case.trained)
    ]
    sums = [sum(weight for weight, _ in row) for row in credit]
    rollouts = sum(total > 0 for total in sums)
    total = torch.zeros((), dtype=torch.float64)
    for r, row in enumerate(credit):
        counted = [t for t, (weight, _) in enumerate(row) if weight > 0]
        if not counted:
            continue
        mean_drift = (policy[r] - start[r]).detach()[counted].mean()
        for t in counted:
            weight, advantage = row[t]
            normaliser = {
                "token": sum(sums),
                "sequence": sums[r] * rollouts,
                "constant": config.rollout.max_rollout_tokens * rollouts,
            }[own.normalisation]
            term = -loss.entropy_weight * entropies[r][t]
            if not loss.is_pairwise:
                advantage *= off_policy_weight(config, float(start[r][t] - case.rollout_logprobs[r][t]))
                term = term + surrogate(loss.name, own, policy[r][t], start[r][t], advantage, mean_drift)
                difference = reference[r][t] - policy[r][t]
                term = term + own.kl_weight * (difference.exp() - difference - 1)
            total = total + weight / normaliser * term
    return total + flat_pairs(case, config, policy, reference) if loss.is_pairwise else total


def surrogate(
    name: str, own: LossSettings, policy: Tensor, start: Tensor, advantage: float, mean_drift: Tensor
) -> Tensor:
    if name == "sft":
        return -policy
    low, high = 1 - own.clip_low, 1 + own.clip_high
    if name == "cispo":
        return -min(max(float((policy - start).detach().exp()), low), high) * advantage * policy
    ratio = (policy - start).exp()
    if name == "gspo":
        ratio = mean_drift.exp() * (policy - policy.detach()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def off_policy_weight(config: Config, log_ratio: float) -> float:
    options, ratio = config.off_policy, float(np.exp(log_ratio))
    if not options.corrects:
        return 1.0
    if options.mask_below is not None and ratio < options.mask_below:
        return 0.0
    if options.mask_above is not None and ratio > options.mask_above:
        return 0.0
    return ratio if options.truncate_at is None else min(ratio, options.truncate_at)


def flat_pairs(case: Case, config: Config, policy: list[Tensor], reference: list[Tensor]) -> Tensor:
    """Mean over all pairs of all groups."""
    beta, losses = config.loss.settings.beta, []
    margins = []
    for r, mask in enumerate(case.trained):
        keep = torch.from_numpy(mask)
        margin = (policy[r] - reference[r])[keep].sum()
        margins.append(margin / max(1, int(mask.sum())) if config.loss.name == "dpo_norm" else margin)
    for group, matrix in zip(case.groups, case.preferences, strict=True):
        for a, i in enumerate(group):
            for b, j in enumerate(group):
                if a < b:
                    h, p = margins[i] - margins[j], float(matrix[a, b])
                    if config.loss.name == "ipo":
                        c = 1 / (2 * beta)
                        losses.append(p * (h - c) ** 2 + (1 - p) * (h + c) ** 2)
                    else:
                        log = torch.nn.functional.logsigmoid
                        losses.append(-p * log(beta * h) - (1 - p) * log(-beta * h))
    return torch.stack(losses).mean()


@st.composite
def forked_cases(draw: st.DrawFn) -> Case:
    """2 to 6 rollouts of few token ids, so that they agree by chance too; forks of forks, any mask."""
    count = draw(st.integers(2, 6))
    sequences: list[list[int]] = []
    masks: list[list[bool]] = []
    parents, positions = [], []
    for r in range(count):
        parent = draw(st.integers(-1, r - 1))
        position = draw(st.integers(1, len(sequences[parent]))) if parent >= 0 else 0
        own = draw(st.lists(st.integers(0, 2), min_size=0 if parent >= 0 else 2, max_size=6))
        trained = draw(st.lists(st.booleans(), min_size=len(own), max_size=len(own)))
        sequences.append((sequences[parent][:position] if parent >= 0 else []) + own)
        masks.append((masks[parent][:position] if parent >= 0 else []) + trained)
        masks[-1][0] = False
        parents.append(parent)
        positions.append(position)
    if not any(any(mask) for mask in masks):
        masks[0][1] = True
        for r in range(1, count):  # what is inherited is trained alike
            if parents[r] >= 0 and positions[r] > 1:
                masks[r][1] = masks[parents[r]][1]
    value = st.integers(-2, 2)
    returns = np.array(draw(st.lists(value, min_size=count, max_size=count)), np.float64)
    label = st.sampled_from([0.0, 0.3, 0.5, 1.0])
    above = draw(st.lists(label, min_size=count * count, max_size=count * count))
    upper = np.triu(np.array(above).reshape(count, count), 1)
    return Case(
        sequences=[np.array(s) for s in sequences],
        trained=[np.array(m, np.bool_) for m in masks],
        parents=parents,
        fork_positions=positions,
        groups=[list(range(count))],
        preferences=[upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(count)],
        advantages=returns,
        returns=returns,
        rollout_logprobs=[np.zeros(len(s), np.float32) for s in sequences],
    )
