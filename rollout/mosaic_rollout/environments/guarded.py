"""An episode around foreign code: whatever that does, a call is an observation and a verdict is one.

Adapters say how a call is carried out and how the episode is judged; what holds for all of them is here:

- arguments are checked against the tool's schema and copied, so the call on record stays as it was written;
- whatever a tool raises is an error observation;
- one thing is done at a time: while a call that overran its time limit still runs in its thread, nothing
  else touches the episode, and the verdict waits for it;
- verdicts are checked.
"""

from __future__ import annotations

import copy
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode, checked_verdict
from mosaic_rollout.foreign.checks import find_schema, wrong_arguments
from mosaic_rollout.foreign.code import BrokenContract
from mosaic_rollout.types import JsonValue, Message, Observation, ToolCall, ToolSchema, Verdict

PATIENCE_S = 60.0
"""How long a verdict waits for a call that still runs, where nobody has waited for it before."""

UNJUDGED = Verdict(harm=False, done=False, progress=0.0, details={"needs_judge": 1.0})
"""Of an episode of a benchmark without a checker of its own: a judge says what was done."""


def function_tool(name: str, description: str, parameters: JsonValue) -> ToolSchema:
    """An OpenAI tool; `parameters` is the JSON schema of its arguments."""
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def as_text(result: object) -> str:
    """What a tool returned: a text as it is, anything else as JSON where it can be, else by its str()."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(result)


def bounded(text: str, limit_chars: int) -> str:
    """The text, cut after `limit_chars`, saying so.

    >>> bounded("abcdef", 4)
    'abcd\\n[2 more characters are not shown]'
    """
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be tokenised
    if len(text) <= limit_chars:
        return text
    return f"{text[:limit_chars]}\n[{len(text) - limit_chars} more characters are not shown]"


class GuardedEpisode(ABC):
    """What the adapters' episodes have in common. They give `_carry_out` and `_judge`.

    checks_arguments: against the tool's schema, here; False where the package does it itself, in its own
    way, and its figures are to be compared. error_head: how error observations begin.
    """

    messages: Sequence[Message]
    tools: Sequence[ToolSchema]
    checks_arguments = True
    error_head = "Error"

    def __init__(self, code: ForeignCode, max_observation_chars: int) -> None:
        self._code, self._limit = code, max_observation_chars
        self._busy = threading.Lock()

    def step(self, call: ToolCall) -> Observation:
        """Run one tool call; whatever goes wrong is an error observation."""
        if not self._busy.acquire(timeout=PATIENCE_S):
            return self._error(f"{call.name} was not run, an earlier call is still running")
        try:
            if (wrong := self._wrong(call)) is not None:
                return self._error(wrong)
            observation = self._carry_out(ToolCall(call.name, copy.deepcopy(call.arguments)))
            return Observation(bounded(observation.content, self._limit), observation.is_error)
        except (KeyboardInterrupt, BrokenContract):
            raise
        except BaseException as raised:  # noqa: BLE001  a tool may raise anything, and the rollout goes on
            return self._error(self._report(raised))
        finally:
            self._busy.release()

    def score(self, final_answer: str | None) -> Verdict:
        """The episode's verdict, once no call runs any more. UserError where it is not of its kind."""
        with self._alone("the verdict"):
            return checked_verdict(f"a verdict of {self._code.name}", self._judge(final_answer))

    @abstractmethod
    def _carry_out(self, call: ToolCall) -> Observation:
        """Run a call whose arguments fit and are the tool's to keep. It may raise anything."""

    @abstractmethod
    def _judge(self, final_answer: str | None) -> Verdict:
        """The verdict of the episode as it stands, with the policy's final answer if there is one."""

    def _report(self, raised: BaseException) -> str:
        """What a tool raised, in words."""
        return self._code.report(raised)

    def _wrong(self, call: ToolCall) -> str | None:
        tool = find_schema(self.tools, call.name)
        if tool is None or not self.checks_arguments:
            return None
        wrong = wrong_arguments(tool, call.arguments, types=self._checks_types(call.name))
        return None if wrong is None else f"{call.name}: {wrong}"

    def _checks_types(self, tool: str) -> bool:
        """Whether the arguments of a tool must have the types of its schema."""
        return True

    def _error(self, text: str) -> Observation:
        return Observation(bounded(f"{self.error_head}: {text}", self._limit), is_error=True)

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Nothing else touches the episode meanwhile. UserError where a call does not end."""
        if not self._busy.acquire(timeout=PATIENCE_S):
            raise UserError(
                f"{self._code.name}: a tool call has not ended {PATIENCE_S:g} seconds after its time limit, "
                f"and {what} would come before it; give the tool a limit of its own"
            )
        try:
            yield
        finally:
            self._busy.release()
