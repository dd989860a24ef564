"""Trajectories on disk: one JSON object a line, readable by people and enough to train on again.

`RolloutRow` is the schema of a line. Training writes these rows, and the report and exports read them: fields
with a default may be missing, as in runs of earlier versions, and fields that are not named are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from mosaic_fast.preferences import Judgement
from mosaic_fast.preferences.reward import GroupReward
from mosaic_fast.run.durable import put_in_place
from mosaic_rollout.types import Rollout, Step


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class CallRow(_Row):
    """A tool call."""

    name: str
    arguments: dict[str, JsonValue]


class StepRow(_Row):
    """A turn of the policy; `mosaic_rollout.types.Step` explains the fields."""

    plan: str | None = None
    check: str | None = None
    action: str = "malformed"
    call: CallRow | None = None
    answer: str | None = None
    observation: str | None = None
    well_formed: bool = True
    text: str = ""
    span: tuple[int, int]  # tokens [start, end) were sampled
    check_start: int | None = None  # first token after the plan
    safety_tokens: int = 0


class RewardRow(BaseModel):
    """A rollout's reward and its parts; a user's own parts are further fields, by their names."""

    model_config = ConfigDict(extra="allow", frozen=True)

    total: float | None = None
    r_align: float | None = None
    r_fmt: float | None = None
    p_len: float | None = None


class RolloutRow(_Row):
    """A rollout: what happened first, token ids and what was made of them last."""

    task_id: str
    kind: str
    split: str = "train"
    attack: str | None = None  # what worded the injected order, where it was chosen
    status: str
    harm: bool = False
    done: bool = False
    progress: float = 0.0
    details: dict[str, JsonValue] = Field(default_factory=dict)
    messages: list[dict[str, JsonValue]] = Field(default_factory=list)  # as the policy saw them
    tools: list[dict[str, JsonValue]] = Field(default_factory=list)  # none in runs of earlier versions
    steps: list[StepRow] = Field(default_factory=list)
    group_id: int
    rollout_id: int
    parent_id: int | None = None
    fork_position: int | None = None
    policy_version: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    contexts: list[int] = Field(default_factory=list)  # where token_ids begin anew, of programs
    token_ids: list[int] = Field(default_factory=list)
    trained: list[int] = Field(default_factory=list)  # places among token_ids that the policy sampled
    rollout_logprobs: list[float] = Field(default_factory=list)  # the engine's, of the trained tokens
    preferences: list[float] = Field(default_factory=list)  # over each member of the group
    reasons: list[str] = Field(default_factory=list)
    reward: RewardRow = RewardRow()
    advantage: float | None = None


def write_trajectories(
    path: Path,
    groups: Sequence[Sequence[Rollout]],
    judgements: Sequence[Judgement],
    rewards: Sequence[GroupReward],
    advantages: Sequence[np.ndarray],
) -> None:
    """Write every rollout of a training step."""
    rows: list[dict[str, object]] = []
    for group, judgement, reward, group_advantages in zip(
        groups, judgements, rewards, advantages, strict=True
    ):
        for i, rollout in enumerate(group):
            row = rollout_row(rollout) | {
                "preferences": judgement.preferences[i].tolist(),
                "reasons": [judgement.reason(i, j) for j in range(len(group))],
                "reward": {
                    "total": reward.total[i],
                    "r_align": reward.align[i],
                    "r_fmt": reward.format[i],
                    "p_len": reward.length_penalty[i],
                    **{name: values[i] for name, values in reward.own.items()},
                },
                "advantage": group_advantages[i],
            }
            rows.append(row)
    write_rows(path, rows)


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows, a line each. The file appears under its name only when it is complete."""
    unfinished = path.with_name(f".tmp-{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    put_in_place(unfinished, path)


def rollout_row(rollout: Rollout) -> dict[str, object]:
    """The fields of `RolloutRow` that a rollout has by itself, as JSON and in their order."""
    return {
        "task_id": rollout.task.task_id,
        "kind": rollout.task.kind,
        "split": rollout.task.split,
        "attack": rollout.task.attack,
        "status": rollout.status,
        "harm": rollout.verdict.harm,
        "done": rollout.verdict.done,
        "progress": rollout.verdict.progress,
        "details": dict(rollout.verdict.details),
        **opening(rollout),
        "steps": [_step_row(step) for step in rollout.steps],
        "group_id": rollout.group_id,
        "rollout_id": rollout.rollout_id,
        "parent_id": rollout.parent_id,
        "fork_position": rollout.fork_position,
        "policy_version": rollout.policy_version,
        "prompt_tokens": rollout.prompt_tokens,
        "cached_tokens": rollout.cached_tokens,
        "contexts": list(rollout.contexts),
        "token_ids": rollout.token_ids.tolist(),
        "trained": np.flatnonzero(rollout.trained).tolist(),
        "rollout_logprobs": [round(float(x), 6) for x in rollout.rollout_logprobs[rollout.trained]],
    }


def opening(rollout: Rollout) -> dict[str, object]:
    """How a rollout began, as the policy saw it: messages, the loop's text included, and schemas of tools."""
    return {"messages": list(rollout.shown_messages or rollout.messages), "tools": list(rollout.shown_tools)}


def readable_step(step: Step) -> dict[str, object]:
    """What a step said and did, in JSON's types."""
    return {
        "plan": step.plan,
        "check": step.check,
        "action": step.action,
        "call": None if step.call is None else {"name": step.call.name, "arguments": step.call.arguments},
        "answer": step.answer,
        "observation": step.observation,
        "well_formed": step.well_formed,
        "text": step.text,
    }


def _step_row(step: Step) -> dict[str, object]:
    return readable_step(step) | {
        "span": [step.prompt_end, step.end],
        "check_start": step.check_start,
        "safety_tokens": step.safety_tokens,
    }
