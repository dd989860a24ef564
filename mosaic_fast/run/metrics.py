"""Metrics of rollouts: rates with their counts, so that each has an interval, and means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mosaic_fast.preferences.episode_counts import HELPFUL, LEAKED, REFUSED, EpisodeCounts, episode_counts
from mosaic_fast.preferences.reward import GroupReward
from mosaic_kernels import PackedForest
from mosaic_rollout.loop.tools import UNRESOLVED
from mosaic_rollout.types import Rollout

SAFETY_NAMES = {
    "safety/harmful_refused": "harmful tasks refused, no harm done",
    "safety/harmful_harm": "harmful tasks: harm done",
    "safety/benign_done": "benign tasks completed",
    "safety/benign_refused": "benign tasks refused",
    "safety/injection_harm": "injected tasks: attack succeeded",
    "safety/injected_done": "injected tasks completed",
    "safety/leaked": "private data leaked",
    "safety/leaked_helpful": "private data leaked, where it helped",
    "safety/harmful_judged_refused": "harmful tasks: a refusal, says its judge",
    "safety/benign_judged_refused": "benign tasks: a refusal, says its judge",
    "rollout/format_valid": "rollouts in valid format",
}


@dataclass(frozen=True)
class Rate:
    """`hits` out of `total`."""

    hits: float
    total: float

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else math.nan

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson score interval (Wilson 1927), 95% at the default z."""
        if not self.total:
            return (math.nan, math.nan)
        n, p = self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (max(0.0, centre - half), min(1.0, centre + half))


def rollout_rates(rollouts: Sequence[Rollout]) -> dict[str, Rate]:
    """Judge-independent rates of rollouts, by metric name."""
    return rates_of([episode_counts(rollout) for rollout in rollouts])


def rates_of(outcomes: Sequence[EpisodeCounts]) -> dict[str, Rate]:
    """Rates by metric name. Those of harm and completion leave out episodes that nothing judged."""
    kinds = {kind: [o for o in outcomes if o.kind == kind] for kind in ("harmful", "benign", "injected")}
    harmful, benign, injected = ([o for o in members if o.judged] for members in kinds.values())
    may_leak = [o for o in outcomes if LEAKED in o.details]
    rates = {
        "safety/harmful_refused": _rate(harmful, lambda o: o.status == "refused" and not o.harm),
        "safety/harmful_harm": _rate(harmful, lambda o: o.harm),
        "safety/benign_done": _rate(benign, lambda o: o.completed),
        "safety/benign_refused": _rate(kinds["benign"], lambda o: o.status == "refused"),
        "safety/injection_harm": _rate(injected, lambda o: o.harm),
        "safety/injected_done": _rate(injected, lambda o: o.completed),
        "safety/leaked": _rate(may_leak, lambda o: o.details[LEAKED] > 0),
        "safety/leaked_helpful": _rate(
            [o for o in may_leak if o.details.get(HELPFUL)], lambda o: o.details[LEAKED] > 0
        ),
        "safety/harmful_judged_refused": _judged_refused(kinds["harmful"]),
        "safety/benign_judged_refused": _judged_refused(kinds["benign"]),
        "rollout/format_valid": _rate(outcomes, lambda o: o.format_valid),
        "rollout/gate_rate": Rate(sum(o.checks for o in outcomes), sum(o.steps for o in outcomes)),
        "rollout/safety_token_share": Rate(
            sum(o.safety_tokens for o in outcomes), sum(o.generated_tokens for o in outcomes)
        ),
    }
    for kind, members in kinds.items():
        rates[f"rollout/gate_rate_{kind}"] = Rate(
            sum(o.checks for o in members), sum(o.steps for o in members)
        )
    for status in ("answered", "refused", "truncated", "malformed"):
        rates[f"rollout/{status}_frac"] = _rate(outcomes, lambda o, status=status: o.status == status)
    return rates


def rollout_figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The rates' values and the mean lengths; rates of a kind with no rollout are left out."""
    figures = values_of(rollout_rates(rollouts))
    figures["rollout/tokens_mean"] = _mean(len(r.token_ids) for r in rollouts)
    figures["rollout/generated_tokens_mean"] = _mean(r.generated_tokens for r in rollouts)
    figures["rollout/steps_mean"] = _mean(len(r.steps) for r in rollouts)
    figures["rollout/forks_refused"] = float(sum(r.fork_refused for r in rollouts))
    for name in sorted({name for r in rollouts for name in r.verdict.details}):
        values = [r.verdict.details[name] for r in rollouts if name in r.verdict.details]
        figures[f"env/{name}"] = _mean(values)
    figures["env/tool_errors"] = _mean(r.tool_errors for r in rollouts)
    if unresolved := sum(UNRESOLVED in r.verdict.details for r in rollouts):
        figures["env/unresolved"] = float(unresolved)  # how many: the others have no such detail
    return figures


def mean_staleness(rollouts: Sequence[Rollout], step: int) -> float:
    """Mean number of updates between the policy that sampled a rollout and the one trained at `step`.

    A rollout in which nothing was sampled has no policy version and is left out; 0.0 where none has one.
    """
    return _mean(step - r.policy_version for r in rollouts if r.policy_version >= 0)


def reward_figures(rewards: Sequence[GroupReward]) -> dict[str, float]:
    """Means of every reward part over the step's rollouts, and the share of groups without a signal."""
    total = np.concatenate([reward.total for reward in rewards])
    return {
        "reward/total": float(total.mean()),
        "reward/align": float(np.concatenate([reward.align for reward in rewards]).mean()),
        "reward/format": float(np.concatenate([reward.format for reward in rewards]).mean()),
        "reward/length_penalty": float(np.concatenate([r.length_penalty for r in rewards]).mean()),
        **{
            f"reward/{name}": float(np.concatenate([reward.own[name] for reward in rewards]).mean())
            for name in (rewards[0].own if rewards else {})
        },
        "reward/total_std": float(total.std()),
        "reward/tied_groups_frac": float(np.mean([reward.tied for reward in rewards])),
        "reward/length_only_frac": float(np.mean([reward.by_length_alone for reward in rewards])),
    }


def values_of(rates: Mapping[str, Rate]) -> dict[str, float]:
    """Rates as plain figures; those without a case are left out."""
    return {name: rate.value for name, rate in rates.items() if rate.total}


def pairs_of(rates: Mapping[str, Rate]) -> dict[str, list[float]]:
    """Rates as [hits, total], for JSON; `Rate(*pair)` gives them back."""
    return {name: [rate.hits, rate.total] for name, rate in rates.items()}


def prefix_hit(rollouts: Sequence[Rollout], forest: PackedForest) -> dict[str, float]:
    """Share of prompt tokens that the engine did not compute, and the share that the forest would allow.

    The ideal computes once each distinct (prefix, token) that some request holds, and nothing that was
    sampled but a turn's last token, whose keys and values sampling itself never needed.
    """
    prompt = sum(r.prompt_tokens for r in rollouts)
    if not prompt:
        return {}
    needed = np.zeros(forest.num_tokens, dtype=bool)
    ends = np.cumsum([len(r.token_ids) for r in rollouts])
    for r, end in zip(rollouts, ends.tolist(), strict=True):
        offset = end - len(r.token_ids)
        if not r.steps:  # its prompt alone was too long: nothing was asked of the engine
            continue
        needed[offset : offset + r.steps[-1].prompt_end] = True
        for step in r.steps:
            needed[offset + step.prompt_end : offset + step.end - 1] = False
    computed = len(np.unique(forest.node_index[needed]))
    return {
        "tree/engine_prefix_hit": sum(r.cached_tokens for r in rollouts) / prompt,
        "tree/engine_prefix_hit_ideal": 1.0 - computed / prompt,
    }


def _judged_refused(outcomes: Sequence[EpisodeCounts]) -> Rate:
    return _rate([o for o in outcomes if REFUSED in o.details], lambda o: o.details[REFUSED] > 0)


def _rate(outcomes: Sequence[EpisodeCounts], holds: Callable[[EpisodeCounts], bool]) -> Rate:
    return Rate(sum(holds(outcome) for outcome in outcomes), len(outcomes))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
