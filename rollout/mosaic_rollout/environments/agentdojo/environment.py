"""AgentDojo as an environment: its suites, tools, tasks, attacks and checkers, one tool call at a time.

AgentDojo (Debenedetti et al., arXiv 2406.13352; MIT licence; `agentdojo==0.1.35`) carries 97 user tasks and
35 injection tasks in four suites: banking, slack, travel, workspace. An injected task is a user task whose
tool outputs hold an attack that asks for an injection task. Nothing of the benchmark is stored in this
repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from mosaic_rollout.environments.agentdojo.api import State, load_agentdojo
from mosaic_rollout.environments.agentdojo.demonstrations import Demonstration, choose
from mosaic_rollout.environments.agentdojo.episode import AgentDojoEpisode
from mosaic_rollout.environments.agentdojo.tasks import (
    Payload,
    build_pools,
    draw,
    make_task,
    payload_of,
    payloads,
)
from mosaic_rollout.environments.agentdojo.world import find_suites, open_world
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Message, Task


class AgentDojoEnvironment:
    """AgentDojo's tasks, benign (the user task alone) and injected (with an attack in the tool outputs).

    suites: suites to draw from. version: AgentDojo's benchmark version. attack: name of the attack that
    writes the injections. heldout_frac: share of the user tasks, and of the injection tasks, of every suite
    that is held out. heldout_suites: suites that are the held-out split instead. injected_frac: share of
    injected tasks in a sample. max_observation_chars: longer tool outputs are cut there and say so.
    demonstrations: solved training tasks of the same suite that open every conversation; they are taken out
    of the training split.

    Raises EnvironmentMissing where agentdojo is not installed, UserError for an unknown name.

    >>> environment = AgentDojoEnvironment(suites=("banking",))                    # doctest: +SKIP
    >>> [task.task_id for task in environment.sample("train", 2, seed=0)]          # doctest: +SKIP
    ['banking/user_task_12', 'banking/user_task_5/injection_task_0']
    """

    name = "agentdojo"

    def __init__(
        self,
        suites: Sequence[str] = ("banking", "slack"),
        *,
        version: str = "v1.2.2",
        attack: str = "important_instructions_no_names",
        heldout_frac: float = 0.25,
        heldout_suites: Sequence[str] = (),
        injected_frac: float = 0.5,
        max_observation_chars: int = 16_000,
        demonstrations: int = 0,
    ) -> None:
        if not 0.0 < heldout_frac < 1.0 or not 0.0 <= injected_frac <= 1.0:
            raise UserError("heldout_frac must lie between 0 and 1, injected_frac in [0, 1]")
        if shared := set(suites) & set(heldout_suites):
            raise UserError(f"suites and heldout_suites both name {', '.join(sorted(shared))}")
        self._api = load_agentdojo()
        train = find_suites(self._api, version, suites)
        heldout = find_suites(self._api, version, heldout_suites)
        self._pools = build_pools(train, heldout, heldout_frac)
        self._worlds = {
            name: open_world(self._api, suite, attack) for name, suite in {**train, **heldout}.items()
        }
        self._injected_frac = injected_frac
        self._max_observation_chars = max_observation_chars
        self._opening_state = lru_cache(maxsize=64)(self._parse_state)  # a group's rollouts share one parse
        self._examples: dict[str, list[Message]] = {name: [] for name in self._worlds}
        for name in train:
            self._add_examples(name, demonstrations)

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, a pure function of its arguments; repeats only once a pool is used up."""
        return draw(self._pools, split, count, seed, self._injected_frac)

    def tasks(self, split: str, *, injected: bool) -> list[Task]:
        """Every task of one kind in a split, in AgentDojo's order."""
        by_suite = payloads(self._pools, split, injected=injected)
        return [make_task(payload, split) for suite in by_suite.values() for payload in suite]

    def reset(self, task: Task) -> AgentDojoEpisode:
        """A fresh episode of a task that `sample` or `tasks` gave."""
        payload = payload_of(task)
        return AgentDojoEpisode(
            self._api,
            self._worlds[payload.suite],
            payload,
            self._opening_state(payload),
            self._max_observation_chars,
            self._examples[payload.suite],
        )

    def _add_examples(self, suite: str, count: int) -> None:
        """Take `count` user tasks out of the training split and keep their solutions as messages."""
        users = self._pools["train"][suite][0]
        if count == 0:
            return
        played = [Demonstration(self.reset(make_task(Payload(suite, user, None), "train"))) for user in users]
        chosen = choose(played, count)
        if len(chosen) < count or len(users) - count < 1:
            raise UserError(f"{suite} has {len(chosen)} tasks short enough for a demonstration, not {count}")
        for index in chosen:
            self._examples[suite] += played[index].messages
        for index in sorted(chosen, reverse=True):
            users.pop(index)

    def _parse_state(self, payload: Payload) -> State:
        return self._worlds[payload.suite].opening_state(payload.user_task, payload.injection_task)
