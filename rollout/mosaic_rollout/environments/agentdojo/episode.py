"""One AgentDojo task being acted on."""

from __future__ import annotations

import copy
import re
from ast import literal_eval
from collections.abc import Sequence
from datetime import datetime

from mosaic_rollout.environments.agentdojo.api import AgentDojo, Call, InjectionTask, State, UserTask
from mosaic_rollout.environments.agentdojo.stable import settle
from mosaic_rollout.environments.agentdojo.tasks import Payload
from mosaic_rollout.environments.agentdojo.world import World
from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.raised import words
from mosaic_rollout.types import JsonValue, Message, Observation, ToolCall, Verdict

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
