"""Trajectories on disk: one JSON object a line, readable by people and enough to train on again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mosaic_fast.preferences import Judgement
from mosaic_fast.preferences.reward import GroupReward
from mosaic_fast.run.durable import put_in_place
from mosaic_rollout.types import Rollout, Step


def write_trajectories(
    path: Path,
    groups: Sequence[Sequence[Rollout]],
    judgements: Sequence[Judgement],
    rewards: Sequence[GroupReward],
    advantages: Sequence[np.ndarray],
) -> None:
    """Write every rollout of a training step. The file appears under its name only when it is complete."""
    unfinished = path.with_name(f".tmp-{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
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
                    },
                    "advantage": group_advantages[i],
                }
                file.write(json.dumps(row) + "\n")
    put_in_place(unfinished, path)


def rollout_row(rollout: Rollout) -> dict[str, object]:
    """A rollout as JSON: what happened first, token ids last."""
    return {
        "task_id": rollout.task.task_id,
        "kind": rollout.task.kind,
        "split": rollout.task.split,
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
