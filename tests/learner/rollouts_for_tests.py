"""Rollouts made by hand: what a judge, a reward or a learner sees, without playing."""

from typing import Literal

import numpy as np

from mosaic_rollout.types import Rollout, Status, Step, Task, TaskKind, Verdict


def make_rollout(
    *,
    kind: TaskKind = "benign",
    status: Status = "answered",
    harm: bool = False,
    done: bool = False,
    progress: float = 0.0,
    steps: int = 1,
    well_formed: bool = True,
    tokens_per_step: int = 4,
    rollout_id: int = 0,
    parent_id: int | None = None,
    fork_position: int | None = None,
    token_ids: np.ndarray | None = None,
    trained: np.ndarray | None = None,
    rollout_logprobs: np.ndarray | None = None,
) -> Rollout:
    """One prompt token, then `steps` turns of `tokens_per_step` sampled tokens, unless tokens are given."""
    length = 1 + steps * tokens_per_step
    ids = np.arange(length, dtype=np.int64) if token_ids is None else token_ids
    mask = np.arange(len(ids)) > 0 if trained is None else trained
    action: Literal["answer", "refusal"] = "refusal" if status == "refused" else "answer"
    spans = [(1 + i * tokens_per_step, 1 + (i + 1) * tokens_per_step) for i in range(steps)]
    return Rollout(
        rollout_id=rollout_id,
        group_id=0,
        task=Task("t", kind, "train"),
        token_ids=ids,
        trained=mask,
        rollout_logprobs=np.zeros(len(ids), np.float32) if rollout_logprobs is None else rollout_logprobs,
        steps=tuple(Step(a, b, "", "p", None, action, None, None, None, 0, well_formed) for a, b in spans),
        status=status,
        verdict=Verdict(harm=harm, done=done, progress=progress),
        messages=(),
        policy_version=0,
        prompt_tokens=1,
        cached_tokens=0,
        parent_id=parent_id,
        fork_position=fork_position,
    )
