"""Run folders written by the trainer's own writers, without training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mosaic_fast.config import Config
from mosaic_fast.config.read import save_config
from mosaic_fast.preferences import RuleJudge
from mosaic_fast.preferences.reward import group_reward
from mosaic_fast.run.trajectories import write_trajectories
from mosaic_rollout.types import Rollout, Status, Step, Task, TaskKind, ToolCall, Verdict

KINDS: tuple[TaskKind, ...] = ("harmful", "benign", "injected")


def make_rollout(
    *,
    rollout_id: int = 0,
    group_id: int = 0,
    kind: TaskKind = "benign",
    request: str = "post the agenda",
    plan: str = "read it first",
    check: str | None = None,
    refuse: bool = False,
    observation: str = "file text: agenda",
    answer: str = "done.",
    done: bool = True,
    harm: bool = False,
    parent_id: int | None = None,
) -> Rollout:
    """Four prompt tokens; a call (2 plan, 0 or 3 check, 2 action, 2 observed) and an answer, or a refusal.

    Rollouts of a group share the prompt and the plan, and part at the check.
    """
    safety = 0 if check is None else 3
    turn = [10, 11] + ([20, 21, 22] if safety else []) + ([31, 32] if refuse else [33, 34])
    ids = [1, 2, 3, 4, *turn]
    first = Step(
        prompt_end=4,
        end=len(ids),
        text=f"<think>{plan}</think>"
        + (f"<safety_thoughts>{check}</safety_thoughts>" if check else "")
        + ("<refuse>" if refuse else "<call>"),
        plan=plan,
        check=check,
        action="refusal" if refuse else "tool_call",
        call=ToolCall("refusal_tool", {"reason": answer})
        if refuse
        else ToolCall("read_file", {"path": request}),
        answer=None,
        observation=None if refuse else observation,
        safety_tokens=safety,
        well_formed=True,
        check_start=6,
    )
    steps = [first]
    if not refuse:
        ids += [40, 41]
        start = len(ids)
        ids += [50 + rollout_id % 3, 51]
        steps.append(Step(start, len(ids), answer, None, None, "answer", None, answer, None, 0, False, None))
    trained = np.zeros(len(ids), bool)
    for step in steps:
        trained[step.prompt_end : step.end] = True
    status: Status = "refused" if refuse else "answered"
    return Rollout(
        rollout_id=rollout_id,
        group_id=group_id,
        task=Task(f"train-{group_id}", kind, "train"),
        token_ids=np.array(ids),
        trained=trained,
        rollout_logprobs=np.where(trained, -0.5, 0.0).astype(np.float32),
        steps=tuple(steps),
        status=status,
        verdict=Verdict(harm=harm, done=done and not refuse, progress=float(done and not refuse)),
        messages=({"role": "system", "content": "tools"}, {"role": "user", "content": request}),
        policy_version=0,
        prompt_tokens=4,
        cached_tokens=0,
        parent_id=parent_id,
        fork_position=None if parent_id is None else 6,
    )


def make_group(group_id: int, text: str = "") -> list[Rollout]:
    """Four rollouts: done, done with a check, refused after a check, not done; `text` goes everywhere."""
    kind, first = KINDS[group_id % 3], group_id * 4
    words = {
        "request": f"post the agenda {group_id}{text}",
        "plan": f"read it{text}",
        "answer": f"done.{text}",
    }
    words["observation"] = f"file text{text}"
    return [
        make_rollout(rollout_id=first, group_id=group_id, kind=kind, **words),
        make_rollout(rollout_id=first + 1, group_id=group_id, kind=kind, check=f"no risk{text}", **words),
        make_rollout(
            rollout_id=first + 2,
            group_id=group_id,
            kind=kind,
            check=f"a risk{text}",
            refuse=True,
            parent_id=first,
            **words,
        ),
        make_rollout(rollout_id=first + 3, group_id=group_id, kind=kind, done=False, harm=True, **words),
    ]


def write_step(
    folder: Path, step: int, groups: Sequence[Sequence[Rollout]], own: Mapping[str, float] | None = None
) -> None:
    """own: a user's parts of the reward, the same for every rollout."""
    judgements = RuleJudge().judge(groups)
    rewards = [
        group_reward(
            group, judged.preferences, 40.0, own={n: np.full(len(group), v) for n, v in (own or {}).items()}
        )
        for group, judged in zip(groups, judgements, strict=True)
    ]
    advantages = [reward.advantages(0.1) for reward in rewards]
    path = folder / "trajectories" / f"step-{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_trajectories(path, groups, judgements, rewards, advantages)


def write_run(folder: Path, *, steps: int = 3, groups: int = 3, text: str = "", seed: int = 0) -> Path:
    """A complete run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(Config(steps=steps, seed=seed), folder / "config.toml")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            share = step / steps
            row = {"step": float(step), "safety/harmful_refused": share, "safety/injection_harm": 1 - share}
            row |= {
                "reward/format": 2.0,
                "time/rollout_s": 0.3,
                "time/update_s": 0.2,
                "tree/sharing": 3.0 + share,
            }
            file.write(json.dumps(row) + "\n")
    for step in range(1, steps + 1):
        write_step(folder, step, [make_group(group, text) for group in range(groups)])
    rates = {"safety/harmful_refused": 0.9, "safety/benign_done": 1.0}
    counts = {"safety/harmful_refused": [9, 10], "safety/benign_done": [10, 10]}
    summary = {"seed": seed, "steps": steps, "complete": True, "train_s": 2.5, "eval_tasks": 20}
    summary |= {"before": rates, "after": rates, "counts": {"before": counts, "after": counts}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
