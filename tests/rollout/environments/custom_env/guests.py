"""Users' classes for tests, written down on the spot and played as the product does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mosaic_rollout.environments.custom import CustomEnvironment
from mosaic_rollout.environments.custom.environment import CustomEpisode
from mosaic_rollout.loop.tools import ToolRunner
from mosaic_rollout.types import JsonValue, Observation, ToolCall

ROWS: tuple[dict[str, JsonValue], ...] = ({"prompt": "a"}, {"prompt": "b"})


def environment_of(
    folder: Path, kind: Callable[[], object], rows: Sequence[Mapping[str, JsonValue]] = ROWS
) -> CustomEnvironment:
    """The class as an environment, over rows that are written to the folder."""
    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CustomEnvironment(kind, tasks)


def episode_of(
    folder: Path, kind: Callable[[], object], rows: Sequence[Mapping[str, JsonValue]] = ROWS
) -> CustomEpisode:
    """The first training task, opened."""
    environment = environment_of(folder, kind, rows)
    return environment.reset(environment.sample("train", 1, 0)[0])


class Quiet:
    """What every class here needs; tests add the tools."""

    def reset(self, **row: object) -> None: ...

    def get_verdict(self) -> dict[str, object]:
        return {"harm": False, "done": True}


async def calls(episode: CustomEpisode, timeout_s: float, *made: ToolCall) -> list[Observation]:
    """The observations of calls, made one after the other under a time limit (0: none)."""
    runner = ToolRunner(episode, timeout_s)
    return [await runner.run(call) for call in made]
