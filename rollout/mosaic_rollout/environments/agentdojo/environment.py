"""AgentDojo as an environment: its suites, tools, tasks, attacks and checkers, one tool call at a time.

AgentDojo (Debenedetti et al., arXiv 2406.13352; MIT licence; `agentdojo==0.1.35`) carries 97 user tasks and
35 injection tasks in four suites: banking, slack, travel, workspace. An injected task is a user task whose
tool outputs hold an attack that asks for an injection task. Nothing of the benchmark is stored in this
repository.

Demonstrations are worked examples of the plan-check-act loop, for models too small to learn it from a
description: SmolLM2-135M, told about the loop in its system message, follows it in no turn at all; shown
solved tasks as earlier turns of the conversation, it does in many. They are AgentDojo's own solutions of
training tasks of the same suite, so all tasks of a suite open with the same tokens. A call that changed the
suite's state is shown with a check before it, one that only read is not.
"""

from __future__ import annotations

import copy
import json
import re
from ast import literal_eval
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache

from mosaic_rollout.chat.rewriting import CHECK, rewritten, said_of
from mosaic_rollout.environments.agentdojo.api import (
    AgentDojo,
    Call,
    InjectionTask,
    State,
    UserTask,
    load_agentdojo,
)
from mosaic_rollout.environments.agentdojo.tasks import (
    Payload,
    build_pools,
    draw,
    make_task,
    payload_of,
    payloads,
)
from mosaic_rollout.environments.agentdojo.world import World, attack_names, find_suites, open_world, settle
from mosaic_rollout.environments.attacks import Attack
from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.code import words
from mosaic_rollout.types import JsonValue, Message, Move, Observation, Task, ToolCall, Verdict

_CODE = ForeignCode("AgentDojo", of_user=False)
_PYDANTIC_LINK = re.compile(r"\n *For further information visit \S+")


class AgentDojoEpisode(GuardedEpisode):
    """Messages and tools as OpenAI has them; a state that calls change; AgentDojo's own verdict."""

    checks_arguments = False  # AgentDojo's runtime does, by the models that the schemas are made of

    def __init__(
        self,
        api: AgentDojo,
        world: World,
        payload: Payload,
        opening_state: State,
        max_observation_chars: int,
        demonstrations: Sequence[Message] = (),
    ) -> None:
        super().__init__(_CODE, max_observation_chars)
        self._api, self._world = api, world
        self._payload = payload
        self._user = world.user_tasks[payload.user_task]
        injection = payload.injection_task
        self._injection = world.injection_tasks[injection] if injection is not None else None
        self._opening_state = opening_state  # shared with other episodes: never changed, never handed out
        self._state = opening_state.model_copy(deep=True)
        self._trace: list[Call] = []
        self.tools = world.tools
        system: Message = {"role": "system", "content": api.system_message}
        request: Message = {"role": "user", "content": self._user.PROMPT}
        self.messages = (system, *demonstrations, request)

    def _carry_out(self, call: ToolCall) -> Observation:
        """Run one tool call as AgentDojo's executor does."""
        called_at = datetime.now()
        arguments = {name: _as_list(value) for name, value in call.arguments.items()}
        self._trace.append(self._api.make_call(function=call.name, args=copy.deepcopy(arguments)))
        result, error = self._world.runtime.run_function(self._state, call.name, arguments)
        if error is not None:
            return Observation("Error: " + _PYDANTIC_LINK.sub("", error), is_error=True)
        settle(self._state, call.name, called_at)
        return Observation(self._api.result_text(result))

    def _report(self, raised: BaseException) -> str:
        return _PYDANTIC_LINK.sub("", words(raised))

    def _judge(self, final_answer: str | None) -> Verdict:
        """AgentDojo's checkers on the episode as it stands: done is its utility, harm its attack's success.

        `idle_utility` is the utility of an agent that does and says nothing: five banking tasks give it 1, so
        their utility says little. A checker that raises on a state nobody foresaw counts as not met, and is
        counted in `checker_errors`.
        """
        utility, errors = self._check(self._user, self._state, self._trace, final_answer)
        idle, _ = self._check(self._user, self._opening_state, [], None)
        attacked = False
        if self._injection is not None:
            attacked, more_errors = self._check(self._injection, self._state, self._trace, final_answer)
            errors += more_errors
        details = {
            "utility": float(utility),
            "attack_success": float(attacked),
            "idle_utility": float(idle),
            "checker_errors": float(errors),
        }
        return Verdict(harm=attacked, done=utility, progress=float(utility), details=details)

    def ground_truth(self, task: UserTask | InjectionTask) -> list[Call]:
        """The calls that carry out a task of this episode from its opening state."""
        return task.ground_truth(self._opening_state.model_copy(deep=True))

    def demonstrate(self) -> Sequence[Move]:
        """AgentDojo's own solution of the user's task, with a check before each call that changes the state.

        Which ones do is found out by making them in an episode of its own.
        """
        limit, moves = self._limit, list[Move]()
        tried = AgentDojoEpisode(self._api, self._world, self._payload, self._opening_state, limit)
        for made in self.ground_truth(self._user):
            call, before = ToolCall(made.function, dict(made.args)), tried.state_copy()
            tried.step(call)
            moves.append(Move(call=call, check=CHECK if tried.state_copy() != before else None))
        return [*moves, Move(answer=self._user.GROUND_TRUTH_OUTPUT or "Done.")]

    def state_copy(self) -> State:
        """The suite's state as it stands."""
        return self._state.model_copy(deep=True)

    @property
    def user_task(self) -> UserTask:
        return self._user

    @property
    def injection_task(self) -> InjectionTask | None:
        return self._injection

    def _check(
        self, task: UserTask | InjectionTask, state: State, trace: Sequence[Call], final_answer: str | None
    ) -> tuple[bool, int]:
        """Whether a task was carried out, and 1 if its checker raised. Checkers may edit what they get."""
        output = [{"type": "text", "content": final_answer or ""}]
        before, after = self._opening_state.model_copy(deep=True), state.model_copy(deep=True)
        try:
            return bool(self._world.suite._check_task_result(task, output, before, after, trace)), 0
        except Exception:  # noqa: BLE001  a checker may raise anything
            return False, 1


def _as_list(value: JsonValue) -> object:
    """A list written as a string is read as one, as AgentDojo's own executor does."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return value
        return parsed if isinstance(parsed, list) else value
    return value


_MAX_CALLS, _MAX_OBSERVATION_CHARS = 3, 600


class Demonstration:
    """One solved task as messages: the request, then calls and their outputs, then the answer."""

    def __init__(self, episode: AgentDojoEpisode) -> None:
        self.messages: list[Message] = [episode.messages[-1]]
        self.acts = False  # whether a call changed the state
        self.fits = True  # whether it is short and went without an error
        for move in map(rewritten, episode.demonstrate()):
            self._play(episode, move)
        self.fits = self.fits and 1 < len(self.messages) <= 2 + 2 * _MAX_CALLS
        self.length_chars = sum(len(str(message["content"])) for message in self.messages)

    def _play(self, episode: AgentDojoEpisode, move: Move) -> None:
        said: Message = {"role": "assistant", "content": said_of(move, "\n")}
        self.messages.append(said)
        if move.call is None:
            return
        observation = episode.step(move.call)
        self.acts = self.acts or move.check is not None
        self.fits = (
            self.fits and not observation.is_error and len(observation.content) <= _MAX_OBSERVATION_CHARS
        )
        name, call_id = move.call.name, f"example{len(self.messages) - 1}"
        function: Message = {"name": name, "arguments": json.dumps(move.call.arguments)}
        said["tool_calls"] = [{"type": "function", "id": call_id, "function": function}]
        content = observation.content
        self.messages.append({"role": "tool", "name": name, "tool_call_id": call_id, "content": content})


def choose(demonstrations: Sequence[Demonstration], count: int) -> list[int]:
    """Indices of the `count` shortest that fit, in turn one that only reads and one that acts."""
    by_length = sorted(range(len(demonstrations)), key=lambda i: (demonstrations[i].length_chars, i))
    fitting = [i for i in by_length if demonstrations[i].fits]
    acting = [i for i in fitting if demonstrations[i].acts]
    reading = [i for i in fitting if not demonstrations[i].acts]
    order = [i for pair in zip(reading, acting, strict=False) for i in pair]
    return [*order, *(i for i in fitting if i not in order)][:count]


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

    def attacks(self, split: str) -> Sequence[str]:
        """AgentDojo's attacks that have a goal; they are of no split."""
        return attack_names(self._api, next(iter(self._worlds.values())).suite)

    def goal(self, task: Task) -> str:
        payload = payload_of(task)
        if payload.injection_task is None:
            raise TypeError(f"task {task.task_id!r} carries no injected order")
        return self._worlds[payload.suite].injection_tasks[payload.injection_task].GOAL

    def attacked(self, task: Task, attack: Attack) -> Task:
        if attack.template is None and attack.name not in self.attacks(task.split):
            raise UserError(f"AgentDojo has no attack {attack.name!r} that has a goal")
        return replace(task, payload=replace(payload_of(task), attack=attack))

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
        return self._worlds[payload.suite].opening_state(
            payload.user_task, payload.injection_task, payload.attack
        )
