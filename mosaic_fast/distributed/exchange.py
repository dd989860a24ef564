"""Groups of rollouts from the ranks that played them to all ranks, as JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

import numpy as np

from mosaic_fast.distributed.world import World
from mosaic_fast.errors import EngineStoppedError
from mosaic_fast.run.interrupt import Stopped
from mosaic_rollout.types import JsonValue, Rollout, Task

_hints = cache(get_type_hints)


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
    """Raise EngineStoppedError on every rank where one has a reason. reasons: of each rank, "" for none."""
    for rank, reason in enumerate(reasons):
        if reason:
            raise EngineStoppedError(reason if world.size == 1 else f"rank {rank}: {reason}")


def packed(rollout: Rollout) -> dict[str, JsonValue]:
    """A rollout as JSON, but for its task, which every rank has. Arrays are base64 of their bytes.

    What it consists of is read off its class: a field that is added there is exchanged.
    """
    own = [field.name for field in fields(Rollout) if field.name != "task"]
    return {name: _plain(getattr(rollout, name)) for name in own}


def unpacked(row: Mapping[str, JsonValue], task: Task) -> Rollout:
    """The rollout that `packed` made a row of."""
    hints = _hints(Rollout)
    return Rollout(task=task, **{name: _typed(hints[name], value) for name, value in row.items()})


def _typed(hint: Any, value: Any) -> Any:
    """A value of JSON as a type hint says: arrays, dataclasses and tuples again; the rest is plain."""
    if value is None:
        return None
    if hint is np.ndarray:
        return np.frombuffer(base64.b64decode(value["bytes"]), value["dtype"])
    if is_dataclass(hint):
        hints = _hints(hint)
        return cast(Any, hint)(**{name: _typed(hints[name], inner) for name, inner in value.items()})
    if get_origin(hint) is tuple:
        return tuple(_typed(get_args(hint)[0], inner) for inner in value)
    if get_origin(hint) is UnionType:  # X | None
        return _typed(get_args(hint)[0], value)
    return value


def _plain(value: object) -> JsonValue:
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "bytes": base64.b64encode(value.tobytes()).decode()}
    if isinstance(value, np.generic):  # a checker's figures may be numpy's
        return value.item()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return cast(JsonValue, value)
