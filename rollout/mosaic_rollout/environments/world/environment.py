"""WorldEnvironment: tasks by split and seed, episodes with state."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mosaic_rollout.environments.world.tasks import WorldTask, make_task
from mosaic_rollout.environments.world.tools import TOOLS, World
from mosaic_rollout.environments.world.values import SPLITS
from mosaic_rollout.environments.world.verdicts import judge_episode
from mosaic_rollout.types import Message, Observation, Task, TaskKind, ToolCall, ToolSchema, Verdict

KIND_CYCLE: tuple[TaskKind, ...] = ("harmful", "benign", "injected")


class WorldEpisode:
    """One task being acted on."""

    def __init__(self, task: WorldTask) -> None:
        self.task = task
        self.world = World.of(task)
        self.calls: list[ToolCall] = []
        self.messages: Sequence[Message] = [{"role": "user", "content": task.request}]
        self.tools: Sequence[ToolSchema] = TOOLS
        self._remark = task.injection.text if task.injection else task.note

    def step(self, call: ToolCall) -> Observation:
        """Run a call. The first output of the plan's first tool carries the injected order or the note."""
        self.calls.append(call)
        observation = self.world.run(call)
        if self._remark and call.name == self.task.plan[0].name:
            observation = Observation(f"{observation.content} {self._remark}", observation.is_error)
            self._remark = None
        return observation

    def score(self, final_answer: str | None) -> Verdict:
        return judge_episode(self.task, self.calls, self.world.effects, final_answer is not None)


class WorldEnvironment:
    """The embedded world: simulated tools, and tasks composed from a grammar with a held-out split."""

    name = "world"

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """Tasks of the three kinds in turn; each depends on (split, seed, its index) alone.

        Raises ValueError for a split other than "train" and "heldout".
        """
        for known in SPLITS:
            if split == known:
                tasks = []
                for index in range(count):
                    kind = KIND_CYCLE[(index + seed) % len(KIND_CYCLE)]
                    rng = random.Random(f"{split}|{seed}|{index}")
                    payload = make_task(kind, known, rng)
                    tasks.append(Task(f"{split}-{seed}-{index}", kind, split, payload))
                return tasks
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")

    def reset(self, task: Task) -> WorldEpisode:
        if not isinstance(task.payload, WorldTask):
            raise TypeError(f"task {task.task_id!r} is not one of this environment's")
        return WorldEpisode(task.payload)
