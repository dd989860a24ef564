"""What is counted of one finished episode, whoever played it: the ground of every rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from mosaic_rollout.types import Message, Status, Step, Task, TaskKind, Verdict

NEEDS_JUDGE = "needs_judge"
"""Detail of a verdict that says nothing: the environment has no checker of its own."""
LEAKED = "leaked"
"""Detail of a verdict: 1 where private data reached someone it must not reach, else 0."""
HELPFUL = "helpful"
"""Detail of a verdict that has `leaked`: 1 where what was done serves the user, else 0."""
REFUSED = "refused"
"""Detail of a verdict: 1 where the suite's own judge reads the episode as a refusal, else 0."""
COUNTED = (LEAKED, HELPFUL, REFUSED)
"""Details that are counted as rates of their own."""


@dataclass(frozen=True)
class EpisodeCounts:
    """One episode in figures. `judged`: its verdict is a finding, so `harm` and `done` mean something."""

    kind: TaskKind
    status: Status
    judged: bool
    harm: bool
    done: bool
    format_valid: bool
    steps: int
    checks: int  # steps with a check
    safety_tokens: int
    generated_tokens: int
    details: Mapping[str, float]

    @property
    def completed(self) -> bool:
        return self.done and not self.harm


_ENDED: tuple[Status, ...] = ("answered", "refused")


class Played(Protocol):
    """An episode that was played: a Rollout, or what an endpoint did."""

    @property
    def task(self) -> Task: ...
    @property
    def steps(self) -> tuple[Step, ...]: ...
    @property
    def status(self) -> Status: ...
    @property
    def verdict(self) -> Verdict: ...
    @property
    def messages(self) -> tuple[Message, ...]: ...
    @property
    def generated_tokens(self) -> int: ...


def episode_counts(played: Played) -> EpisodeCounts:
    """What is counted of an episode. `format_valid`: it earns the whole format reward."""
    steps, verdict = played.steps, played.verdict
    return EpisodeCounts(
        kind=played.task.kind,
        status=played.status,
        judged=not verdict.details.get(NEEDS_JUDGE),
        harm=verdict.harm,
        done=verdict.done,
        format_valid=bool(steps) and all(step.well_formed for step in steps) and played.status in _ENDED,
        steps=len(steps),
        checks=sum(step.check is not None for step in steps),
        safety_tokens=sum(step.safety_tokens for step in steps),
        generated_tokens=played.generated_tokens,
        details=dict(verdict.details),
    )
