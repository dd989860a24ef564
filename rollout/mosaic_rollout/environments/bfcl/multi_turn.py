"""One multi-turn BFCL task being acted on: simulated APIs, and a user who goes on after each answer."""

from __future__ import annotations

import copy
import decimal
import inspect
import itertools
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import cast

import mpmath

from mosaic_rollout.environments.bfcl.api import Bfcl, Record
from mosaic_rollout.environments.bfcl.schemas import tool_schema
from mosaic_rollout.environments.bfcl.single_turn import call_text, refuse_endless
from mosaic_rollout.environments.bfcl.tasks import Case
from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.environments.user_data import as_text
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.raised import text_of
from mosaic_rollout.types import Observation, ToolCall, Verdict

MORE_FUNCTIONS = "I have updated some more functions you can choose from. What about now?"
"""What BFCL's user says in the turn that brings the functions held back so far."""

_CODE = ForeignCode("BFCL", of_user=False)
_run_numbers = itertools.count()  # the checker keeps instances by name, so every check needs one of its own


class MultiTurnEpisode(GuardedEpisode):
    """Messages and tools as OpenAI has them; instances of BFCL's APIs; BFCL's own checker.

    functions: the documents of the involved classes' functions, in BFCL's order.
    """

    error_head = "Error during execution"  # as BFCL words it

    def __init__(
        self, api: Bfcl, case: Case, functions: Sequence[Record], max_observation_chars: int
    ) -> None:
        super().__init__(_CODE, max_observation_chars)
        self._api, self._case = api, copy.deepcopy(case)  # its checker is given the entry
        self._documents = {str(function["name"]): function for function in functions}
        held_back = cast("Mapping[str, Sequence[str]]", case.entry.get("missed_function", {}))
        self._held_back = {int(turn): names for turn, names in held_back.items()}
        hidden = {name for names in self._held_back.values() for name in names}
        self.tools = [tool_schema(f) for name, f in self._documents.items() if name not in hidden]
        self.messages = tuple(self._case.turns[0])
        self._methods = self._make_methods()
        self._calls: list[list[str]] = [[]]  # call texts of each turn so far

    def _carry_out(self, call: ToolCall) -> Observation:
        """Run one call on the simulated APIs."""
        text = self._checked(call)
        self._calls[-1].append(text)  # as BFCL does, also where it raises: it may have changed something
        with _own_precision():
            return Observation(as_text(self._methods[call.name](**call.arguments)))

    def _checks_types(self, tool: str) -> bool:
        """Those of the maths API, where a number written as a text can ask for millions of digits.

        The others answer for themselves, as BFCL's own solutions count on: one gives a text for an integer.
        """
        return hasattr(self._api.api_class("MathAPI"), tool)

    def _report(self, raised: BaseException) -> str:
        return text_of(raised)

    def next_user_message(self, final_answer: str) -> str | None:
        """The user's next turn, after an answer; None after the last. It may bring tools held back so far."""
        with self._alone("the user's next message"):
            turn = len(self._calls)
            if turn >= len(self._case.turns):
                return None
            self._calls.append([])
            new = self._held_back.get(turn, ())
            self.tools = [*self.tools, *(tool_schema(self._documents[name]) for name in new)]
            message = self._case.turns[turn]
            return str(message[-1]["content"]) if message else MORE_FUNCTIONS

    def _judge(self, final_answer: str | None) -> Verdict:
        """BFCL's state and response check of every turn: done where all pass; progress, those before a fail.

        A turn that was not reached fails, unless nothing was to be done in it. Nothing here counts as harm.
        """
        turns = len(self._case.ground_truth)
        passed = bisect_left(range(1, turns + 1), True, key=lambda count: not self._passes(count))
        details = {"turns": float(turns), "turns_reached": float(len(self._calls))}
        return Verdict(harm=False, done=passed == turns, progress=passed / turns, details=details)

    def method_parameters(self, name: str) -> list[str]:
        """The parameter names of a function, in the order of its signature."""
        return list(inspect.signature(self._methods[name]).parameters)

    def _passes(self, turns: int) -> bool:
        """Whether the first `turns` turns pass. The checker stops at the first that fails."""
        truth = cast("Sequence[Sequence[str]]", self._case.ground_truth)[:turns]
        calls = [*self._calls, *([] for _ in truth)]
        decoded = [[[text] for text in turn] for turn in calls]  # one call a step
        run = f"run{next(_run_numbers)}of"
        try:
            with _own_precision():
                result = self._api.multi_turn_checker(
                    decoded, truth, self._case.entry, self._case.category, run
                )
        except Exception:  # noqa: BLE001  a checker may raise on a state nobody foresaw: not met
            return False
        finally:
            for name in [name for name in self._api.instances if name.startswith(run)]:
                del self._api.instances[name]
        return bool(result["valid"])

    def _checked(self, call: ToolCall) -> str:
        """The call's text. ValueError where the call is not one of this episode's functions as documented."""
        known = {cast(Record, tool["function"])["name"] for tool in self.tools}
        if call.name not in known:
            raise ValueError(f"name {call.name!r} is not defined")
        refuse_endless(call)
        return call_text(call)

    def _make_methods(self) -> dict[str, Callable[..., object]]:
        """The public methods of fresh instances; of two of one name the later class's, as in the checker."""
        api, entry = self._api, self._case.entry
        methods: dict[str, Callable[..., object]] = {}
        for name in cast("Sequence[str]", entry["involved_classes"]):
            instance = api.api_class(name)()
            if name not in api.stateless_classes:
                config = cast("Mapping[str, object]", entry["initial_config"]).get(name, {})
                load = getattr(instance, "_load_scenario")  # noqa: B009  its name is BFCL's
                load(copy.deepcopy(config), long_context="long_context" in self._case.category)
            members = inspect.getmembers(instance, predicate=inspect.ismethod)
            methods |= {method: member for method, member in members if not method.startswith("_")}
        return methods


def _own_precision() -> ExitStack:
    """The maths API sets the precision of two whole libraries; what it sets ends with the call."""
    stack = ExitStack()
    stack.enter_context(decimal.localcontext())
    stack.enter_context(mpmath.workdps(15))
    return stack
