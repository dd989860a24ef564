"""What is wrong with a training step, in words: the cause, and the option to change.

A step from which nothing is learnt looks like any other in a table of figures. Each finding here is a
sentence for the step's line; `reward.require_signal` ends the run with those that explain it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mosaic_fast.config import Config
from mosaic_fast.errors import TrainingError
from mosaic_fast.run.metrics import rollout_rates
from mosaic_rollout.loop.agent_loop import Limits
from mosaic_rollout.types import Rollout

FIRST_STEPS = 5
"""Steps that are watched more closely: what is far from usual there is mended before hours are spent."""
LEAST_VALID = 0.5
"""First steps: share of rollouts that keep to the loop's format; runs in the world start at 0.94 and more."""
MOST_TRUNCATED = 0.25
"""First steps: share of rollouts that a limit cuts off; runs in the world start at 0.03 and less."""
LARGEST_MISMATCH = 1.0
"""Nats a token between engine and trainer, which compute the same policy."""
REPEATED_AFTER = 20
"""Steps after which a finding that lasts is said in full again."""

Cut = Literal["prompt", "turn", "rollout", "turns"]


@dataclass(frozen=True)
class _Usual:
    """What an update of a run that goes well stays below."""

    gradient_clips: float  # the gradient's norm, in multiples of optim.grad_clip
    kl: float  # nats a token, by the k3 estimate
    ratio: float  # mean ratio of a token, or its inverse


LATER = _Usual(gradient_clips=100.0, kl=1.0, ratio=10.0)
"""Beyond these the clip holds nothing, and the policy has left the reference."""
AT_FIRST = _Usual(gradient_clips=10.0, kl=0.2, ratio=1.5)
"""Within FIRST_STEPS, next to the reference; runs in the world reach a tenth of KL and norm."""


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know of a step."""

    cause: str  # a few words for it, the same at every step
    text: str
    no_signal: bool = False  # it explains why nothing is learnt
    lasts: bool = True  # False: nothing of the step, so that once is enough


class Findings:
    """Which of a run's findings are said: each in full when it comes up and now and again, else in a word."""

    def __init__(self) -> None:
        self._said: dict[str, int] = {}  # cause -> step at which it was last said in full

    def to_say(self, step: int, found: Sequence[Finding]) -> tuple[list[str], list[str]]:
        """The texts of what is said in full at a step, and the causes that were said in full lately."""
        new = [f for f in found if step - self._said.get(f.cause, -REPEATED_AFTER) >= REPEATED_AFTER]
        known = [f.cause for f in found if f not in new and f.lasts]
        self._said |= {finding.cause: step for finding in new}
        return [finding.text for finding in new], known


def rollout_findings(
    groups: Sequence[Sequence[Rollout]],
    advantages: Sequence[np.ndarray],  # [G] a group
    config: Config,
    limits: Limits,
    step: int = FIRST_STEPS,
) -> list[Finding]:
    """What the rollouts of a step show before anything is trained; `step` were trained before.

    limits: those that hold, which are below the configuration's where model or engine end earlier.
    """
    rollouts = [rollout for group in groups for rollout in group]
    found = [*_long_prompts(rollouts, config, limits), *_all_cut(rollouts, config, limits)]
    if rollouts and all(rollout.status == "malformed" for rollout in rollouts):
        found.append(_all_malformed(rollouts, config))
    elif step < FIRST_STEPS and not found:
        found += _unusual_shares(rollouts, config, limits)
    if not any(rollout.trained.any() for rollout in rollouts):
        found.append(Finding("no token trained", "no token was sampled, so none is trained", no_signal=True))
    elif not any(values.any() for values in advantages):
        found.append(_all_ties(groups, config))
    tasks = {rollout.task.task_id for rollout in rollouts}
    if len(tasks) < len(groups):
        found.append(
            Finding(
                "repeated tasks",
                f"{len(groups)} groups are of {len(tasks)} tasks, fewer than rollout.prompts_per_step; those "
                "of one task are judged apart: lower it, or bring more tasks to train on",
                lasts=False,
            )
        )
    return found


def update_findings(
    figures: Mapping[str, float], trained_tokens: int, config: Config, step: int = FIRST_STEPS
) -> list[Finding]:
    """What an update shows: tokens that did not count, no gradient, and figures that explode.

    figures: the update's metrics by name. trained_tokens: rollout tokens that the policy sampled. step: how
    many were trained before.
    """
    found, usual = [], AT_FIRST if step < FIRST_STEPS else LATER
    dropped, of_all = figures.get("policy/dropped_tokens", 0.0), trained_tokens * config.optim.epochs
    if dropped > 0:
        found.append(
            Finding(
                "dropped tokens",
                f"{dropped:.0f} of {of_all} token terms were left out, since a log-prob of engine, policy or "
                "reference is not finite; try model.dtype = 'float32', or a lower optim.lr",
                no_signal=dropped >= of_all,
            )
        )
    norm = figures.get("optim/grad_norm", 0.0)
    if norm == 0.0:
        found.append(Finding("zero gradient", f"the gradient is zero{_why_zero(figures)}", no_signal=True))
    elif norm > usual.gradient_clips * config.optim.grad_clip:
        found.append(
            Finding(
                "gradient norm",
                f"the gradient's norm is {norm:.3g}, optim.grad_clip cuts it to {config.optim.grad_clip:g}: "
                "lower optim.lr, or raise loss.kl_weight",
            )
        )
    kl, ratio = figures.get("policy/kl", 0.0), figures.get("policy/ratio", 1.0)
    if not kl <= usual.kl:
        found.append(
            Finding(
                "KL",
                f"the KL to the reference is {kl:.3g} a token, the policy has left it: lower optim.lr, or "
                "raise loss.kl_weight",
            )
        )
    if dropped < of_all and not 1.0 / usual.ratio <= ratio <= usual.ratio:
        found.append(
            Finding(
                "ratio",
                f"the mean ratio of new to old policy is {ratio:.3g}: an update goes too far; lower optim.lr "
                "or optim.epochs",
            )
        )
    mismatch = figures.get("mismatch/kl", 0.0)
    if not mismatch <= LARGEST_MISMATCH:
        found.append(
            Finding(
                "mismatch",
                f"engine and trainer are {mismatch:.3g} nats a token apart (mismatch/kl), as if with other "
                "weights; compare their precision and versions, and set off_policy.truncate_at",
            )
        )
    lost = sorted(name for name, value in figures.items() if not math.isfinite(value))
    if lost:
        found.append(
            Finding(
                f"{', '.join(lost)} not finite", f"not finite, and so not in metrics.jsonl: {', '.join(lost)}"
            )
        )
    return found


def no_signal(step: int, found: Sequence[Finding]) -> TrainingError:
    """The error by which reward.require_signal ends a run after `step` steps: why nothing is learnt."""
    causes = [finding.text for finding in found if finding.no_signal] or ["the gradient is zero"]
    return TrainingError(f"step {step + 1}: there is nothing to learn from: {'; '.join(causes)}")


def cut_by(rollout: Rollout, limits: Limits) -> Cut:
    """Which limit a truncated rollout ran into."""
    if not rollout.steps:
        return "prompt"
    last = rollout.steps[-1]
    if last.observation is not None:  # the turn was carried out: there was no next one
        return "turns" if len(rollout.steps) >= limits.max_steps else "rollout"
    return "rollout" if last.end >= limits.max_rollout_tokens else "turn"


def _long_prompts(rollouts: Sequence[Rollout], config: Config, limits: Limits) -> list[Finding]:
    cut = [rollout for rollout in rollouts if not rollout.steps and len(rollout.token_ids)]
    if not cut:
        return []
    longest = max(cut, key=lambda rollout: len(rollout.token_ids))
    text = (
        f"the prompt of task {longest.task.task_id} has {len(longest.token_ids)} tokens, "
        f"{_of_rollouts(config, limits)}: {len(cut)} of {len(rollouts)} rollouts end before their first turn"
    )
    return [Finding("long prompts", text, no_signal=len(cut) == len(rollouts))]


def _all_cut(rollouts: Sequence[Rollout], config: Config, limits: Limits) -> list[Finding]:
    begun = [rollout for rollout in rollouts if rollout.steps]
    if not begun or any(rollout.status != "truncated" for rollout in rollouts):
        return []
    counts = Counter(cut_by(rollout, limits) for rollout in begun)
    if len(counts) == 1:
        (limit,) = counts
        text = f"all {len(begun)} rollouts were cut off at {_limit_in_words(limit, config, limits)}"
    else:
        parts = [f"{n} at {_limit_in_words(limit, config, limits)}" for limit, n in counts.most_common()]
        text = f"all {len(begun)} rollouts were cut off: {', '.join(parts)}"
    return [Finding("cut off", text, no_signal=True)]


def _unusual_shares(rollouts: Sequence[Rollout], config: Config, limits: Limits) -> list[Finding]:
    """Shares of rollouts that are cut off or break the format, which a run should not begin with."""
    cut = [rollout for rollout in rollouts if rollout.status == "truncated" and rollout.steps]
    valid = int(rollout_rates(rollouts)["rollout/format_valid"].hits)
    found = []
    if len(cut) > MOST_TRUNCATED * len(rollouts):
        ((limit, count),) = Counter(cut_by(rollout, limits) for rollout in cut).most_common(1)
        words = _limit_in_words(limit, config, limits)
        text = f"{len(cut)} of {len(rollouts)} rollouts were cut off, {count} of them at {words}"
        found.append(Finding("truncation", text))
    if valid + len(cut) < LEAST_VALID * len(rollouts):
        mend = "begin with a cold start (python -m mosaic_fast.sft)"
        mend = mend if config.rollout.teach_loop else f"set rollout.teach_loop = true, or {mend}"
        text = f"{valid} of {len(rollouts)} rollouts keep to the format of plan, check and act: {mend}"
        found.append(Finding("format", text))
    return found


def _limit_in_words(limit: Cut, config: Config, limits: Limits) -> str:
    words: dict[Cut, str] = {
        "turn": f"rollout.max_step_tokens = {limits.max_step_tokens}; raise it",
        "turns": f"rollout.max_steps = {limits.max_steps}; raise it",
    }
    return words.get(limit) or _raised(config, limits)


def _all_malformed(rollouts: Sequence[Rollout], config: Config) -> Finding:
    last = next((rollout.steps[-1].text for rollout in rollouts if rollout.steps), "")
    shown = " ".join(last.split())
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    mend = (
        "it knows the loop from its prompt alone: try a lower rollout.temperature, or an instruct model"
        if config.rollout.teach_loop
        else "set rollout.teach_loop = true for a model that was not trained on the loop"
    )
    text = f"all {len(rollouts)} rollouts ended by an action that cannot be read, such as {shown!r}; {mend}"
    return Finding("malformed", text, no_signal=True)


def _all_ties(groups: Sequence[Sequence[Rollout]], config: Config) -> Finding:
    """Every advantage is zero, and why that may be."""
    same = all(np.array_equal(r.token_ids, group[0].token_ids) for group in groups for r in group)
    if same:
        mend = "the rollouts of each group are the same text: raise rollout.temperature"
    elif config.judge.name == "rule":
        mend = (
            "to the rule judge they end alike: bring tasks that the policy does or refuses at times, raise "
            "rollout.group_size, or set judge.name = 'llm'"
        )
    else:
        mend = (
            "the judge prefers none: look at the trajectories, raise rollout.group_size, or change its prompt"
        )
    return Finding("ties", f"every group is a tie; {mend}", no_signal=True)


def _why_zero(figures: Mapping[str, float]) -> str:
    """Why a gradient is zero though advantages are not, as the end of a sentence; empty where unknown."""
    if figures.get("policy/clip_frac", 0.0) >= 1.0:
        return ": every token is clipped; widen loss.clip_low and loss.clip_high, or lower optim.lr"
    if figures.get("mismatch/masked_frac", 0.0) >= 1.0:
        return ": every token is masked; widen off_policy.mask_below and off_policy.mask_above"
    return ""


def _raised(config: Config, limits: Limits) -> str:
    asked = config.rollout.max_rollout_tokens
    if limits.max_rollout_tokens < asked:
        return f"the model's {limits.max_rollout_tokens} tokens; use shorter prompts, or a model with more"
    return f"rollout.max_rollout_tokens = {asked}; raise it"


def _of_rollouts(config: Config, limits: Limits) -> str:
    """The limit on a rollout's tokens, and who sets it."""
    if limits.max_rollout_tokens < config.rollout.max_rollout_tokens:
        return f"the model takes {limits.max_rollout_tokens}"
    return f"rollout.max_rollout_tokens is {limits.max_rollout_tokens}, raise it"
