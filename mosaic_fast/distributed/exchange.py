"""Groups of rollouts from the ranks that played them to all ranks, as JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np

from mosaic_fast.distributed.world import World
from mosaic_fast.errors import EngineStoppedError
from mosaic_fast.run.interrupt import Stopped
from mosaic_rollout.types import Gate, JsonValue, Rollout, Step, Task, ToolCall, Verdict

_ARRAYS = {
    "token_ids": np.int64,
    "trained": np.bool_,
    "rollout_logprobs": np.float32,
}
_PLAIN = (
    "rollout_id",
    "group_id",
    "status",
    "messages",
    "shown_messages",
    "shown_tools",
    "policy_version",
    "prompt_tokens",
    "cached_tokens",
    "parent_id",
    "fork_position",
    "tool_errors",
    "fork_refused",
)


@dataclass(frozen=True)
class Share:
    """What a rank has played of a step, by the groups' numbers; or why its engine stopped."""

    groups: Mapping[int, list[Rollout]] = field(default_factory=dict)
    stopped: str = ""
    abandoned: bool = False  # the user asked this rank to stop


def all_groups(world: World, share: Share, tasks: Sequence[Task]) -> list[list[Rollout]]:
    """Every rank's groups, in the order of tasks, on every rank.

    EngineStoppedError on every rank where the engine of one stopped; Stopped where a rank was asked to stop.
    """
    if world.size == 1 and not share.stopped and not share.abandoned:
        return [share.groups[number] for number in range(len(tasks))]
    own: JsonValue = {
        "stopped": share.stopped,
        "abandoned": share.abandoned,
        "groups": {
            str(number): [packed(rollout) for rollout in group] for number, group in share.groups.items()
        },
    }
    every = cast("list[dict[str, JsonValue]]", world.gather(own))
    if any(one["abandoned"] for one in every):
        raise Stopped
    stopped_together(world, [str(one["stopped"]) for one in every])
    found: dict[int, list[Rollout]] = {}
    for one in every:
        groups = cast("dict[str, list[dict[str, JsonValue]]]", one["groups"])
        for number, group in groups.items():
            found[int(number)] = [unpacked(rollout, tasks[int(number)]) for rollout in group]
    return [found[number] for number in range(len(tasks))]


def stopped_together(world: World, reasons: Sequence[str]) -> None:
    """EngineStoppedError where a rank has a reason; every rank is given the reasons of all."""
    for rank, reason in enumerate(reasons):
        if reason:
            raise EngineStoppedError(reason if world.size == 1 else f"rank {rank}: {reason}")


def packed(rollout: Rollout) -> dict[str, JsonValue]:
    """A rollout as JSON, but for its task, which every rank has."""
    row = {name: getattr(rollout, name) for name in _PLAIN}
    for name in _ARRAYS:
        array = getattr(rollout, name)
        row[name] = None if array is None else base64.b64encode(array.tobytes()).decode()
    verdict = rollout.verdict
    row["verdict"] = [
        bool(verdict.harm),
        bool(verdict.done),
        float(verdict.progress),
        {name: float(value) for name, value in verdict.details.items()},
    ]
    row["steps"] = [asdict(step) for step in rollout.steps]
    row["gate"] = None if rollout.gate is None else asdict(rollout.gate)
    return row


def unpacked(row: Mapping[str, JsonValue], task: Task) -> Rollout:
    """The rollout that `packed` made a row of."""
    given = cast("dict[str, Any]", row)
    values = {name: given[name] for name in _PLAIN}
    for name in ("messages", "shown_messages", "shown_tools"):
        values[name] = tuple(given[name])
    for name, kind in _ARRAYS.items():
        text = given[name]
        values[name] = None if text is None else np.frombuffer(base64.b64decode(text), kind)
    values["verdict"] = Verdict(*given["verdict"])
    values["steps"] = tuple(_step(step) for step in given["steps"])
    gate = given["gate"]
    if gate is not None:
        gate["tag"] = tuple(gate["tag"])
    values["gate"] = None if gate is None else Gate(**gate)
    return Rollout(task=task, **values)


def _step(row: dict[str, Any]) -> Step:
    if row["call"] is not None:
        row["call"] = ToolCall(**row["call"])
    return Step(**row)
