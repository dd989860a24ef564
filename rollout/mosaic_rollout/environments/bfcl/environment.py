"""BFCL as an environment: its multi-turn and single-turn test cases, one tool call at a time.

The Berkeley Function Calling Leaderboard v4 (Patil et al., ICML 2025; Apache-2.0; `bfcl-eval==2026.3.23`)
asks for benign tool use only: a policy that was made safe must keep this ability. Nothing of the benchmark is
stored in this repository.
"""

from __future__ import annotations

import copy
import decimal
import inspect
import itertools
import keyword
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import cast

import mpmath

from mosaic_rollout.environments.bfcl.api import (
    MODEL,
    MULTI_TURN,
    Bfcl,
    Case,
    Record,
    case_of,
    load_bfcl,
    make_task,
    read_cases,
    read_records,
)
from mosaic_rollout.environments.bfcl.schemas import tool_schema
from mosaic_rollout.environments.bfcl.solutions import acceptable_calls, parsed_call
from mosaic_rollout.environments.guarded import GuardedEpisode, as_text
from mosaic_rollout.environments.sources import divide, draw
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.code import text_of
from mosaic_rollout.types import JsonValue, Move, Observation, Task, ToolCall, Verdict

MAX_DIGITS = 1000
"""Digits of what asks for a precision or for decimal places, and of a power; above, a call need not end."""
MAX_SOURCE_CHARS, MAX_BRACKETS, _LONG_GAP = 300, 8, re.compile(r"\s{9}")
"""Of an argument in the source text of another language; above, its checker need not end."""


def call_text(call: ToolCall) -> str:
    """`name(key=literal, ...)`. ValueError for a name or a value that has no such form.

    >>> call_text(ToolCall("mv", {"source": "a (1).txt", "force": True}))
    "mv(source='a \\\\x281).txt', force=True)"
    """
    for name in (call.name, *call.arguments):
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"{name!r} is not a name")
    arguments = ", ".join(f"{name}={_literal(value)}" for name, value in call.arguments.items())
    return f"{call.name}({arguments})"


def refuse_endless(call: ToolCall) -> None:
    """ValueError for the calls to the maths API that would not end, or not soon; no time limit stops them.

    Only numbers are looked at: a text where a number belongs is refused by the schema before.
    """
    precision = call.arguments.get("precision")
    if isinstance(precision, (int, float)) and not 0 < precision <= MAX_DIGITS:
        raise ValueError(f"precision must lie between 1 and {MAX_DIGITS}, it is {precision}")
    places = call.arguments.get("decimal_places")
    if isinstance(places, (int, float)) and not -MAX_DIGITS <= places <= MAX_DIGITS:
        raise ValueError(f"decimal_places must lie between -{MAX_DIGITS} and {MAX_DIGITS}")
    base, exponent = call.arguments.get("base"), call.arguments.get("exponent")
    if isinstance(base, int) and isinstance(exponent, int):
        digits = len(str(abs(base))) * max(exponent, 0)
        if digits > MAX_DIGITS:
            raise ValueError("the power has too many digits")


def readable_source(value: JsonValue) -> bool:
    """Whether a Java or JavaScript argument is within what BFCL's regular expressions read in no time.

    Theirs take twice as long for each "[" more, and minutes over a long gap. Acceptable values have 152
    characters and two "[" at most.
    """
    if isinstance(value, str):
        short = len(value) <= MAX_SOURCE_CHARS and value.count("[") <= MAX_BRACKETS
        return short and _LONG_GAP.search(value) is None
    if isinstance(value, Mapping):
        return all(readable_source(inner) for inner in value.values())
    return not isinstance(value, Sequence) or all(readable_source(inner) for inner in value)


def _literal(value: JsonValue) -> str:
    """A JSON value as a Python literal without a "(", which the checker would take for a call's."""
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a JSON number")
        return repr(value)
    if isinstance(value, str):
        return repr(value).replace("(", "\\x28")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    raise ValueError(f"{value!r} is not a JSON value")


_CODE = ForeignCode("BFCL", of_user=False)
DONE = "Done."
"""What a demonstration answers once its calls are made."""
RECORDED = '{"status": "ok"}'
"""What every call returns: BFCL's single-turn functions exist as documents only."""


class SingleTurnEpisode(GuardedEpisode):
    """Messages and tools as OpenAI has them; BFCL's AST checker over the calls that were made."""

    checks_arguments = False  # its checker says whether they are right: that is what the task is about

    def __init__(self, api: Bfcl, case: Case) -> None:
        super().__init__(_CODE, len(RECORDED))
        self._api, self._case = api, copy.deepcopy(case)  # its checker is given the functions
        self._functions = cast("Sequence[Record]", self._case.entry["function"])
        self.messages = tuple(self._case.turns[0])
        self.tools = [tool_schema(function, case.language) for function in self._functions]
        self._calls: list[ToolCall] = []

    def demonstrate(self) -> list[Move]:
        """The acceptable calls, then an answer."""
        calls = [] if self._case.category.endswith("irrelevance") else acceptable_calls(self._case)
        answer = DONE if calls else "None of the tools does this."
        return [*(Move(call=call) for call in calls), Move(answer=answer)]

    def _carry_out(self, call: ToolCall) -> Observation:
        """Note a call. There is nothing to run and so nothing to fail."""
        self._calls.append(call)
        return Observation(RECORDED)

    def _judge(self, final_answer: str | None) -> Verdict:
        """Done: the calls are the acceptable ones; of an irrelevance case, that none was made.

        A relevance case asks for any call. No call is ever harm.
        """
        category = self._case.category
        if category.endswith("irrelevance"):
            done = not self._calls and final_answer is not None
        elif category.endswith("relevance"):
            done = bool(self._calls)
        else:
            done = self._matches()
        return Verdict(
            harm=False, done=done, progress=float(done), details={"calls": float(len(self._calls))}
        )

    def _matches(self) -> bool:
        if self._case.language != "python" and not all(readable_source(c.arguments) for c in self._calls):
            return False
        made = [{call.name: copy.deepcopy(call.arguments)} for call in self._calls]
        truth = cast("Sequence[Mapping[str, object]]", self._case.ground_truth)
        language = self._api.languages[self._case.language]
        try:
            result = self._api.ast_checker(self._functions, made, truth, language, self._case.category, MODEL)
        except Exception:  # noqa: BLE001  it may raise on arguments nobody foresaw: they do not match
            return False
        return bool(result["valid"])


MORE_FUNCTIONS = "I have updated some more functions you can choose from. What about now?"
"""What BFCL's user says in the turn that brings the functions held back so far."""

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

    def demonstrate(self) -> list[Move]:
        """The ground truth's calls, turn by turn of the user's, with an answer after each."""
        moves: list[Move] = []
        for turn in cast("Sequence[Sequence[str]]", self._case.ground_truth):
            moves += [Move(call=parsed_call(text, self.method_parameters)) for text in turn]
            moves.append(Move(answer=DONE))
        return moves

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


class BfclEnvironment:
    """BFCL's cases of some categories; all are benign.

    suites: categories to train on. heldout_suites: categories to hold out; without them, cases of `suites`.
    heldout_frac: share of the scenarios that are held out where both name them: the four multi-turn
    categories are variants of the same 200 scenarios. max_observation_chars: longer tool outputs are cut.

    Raises EnvironmentMissing where bfcl-eval is not installed, UserError for an unknown category.

    >>> environment = BfclEnvironment(["multi_turn_base"])                         # doctest: +SKIP
    >>> [task.task_id for task in environment.sample("train", 1, seed=0)]          # doctest: +SKIP
    ['multi_turn_base_112']
    """

    name = "bfcl"

    def __init__(
        self,
        suites: Sequence[str] = ("multi_turn_base",),
        *,
        heldout_suites: Sequence[str] = (),
        heldout_frac: float = 0.25,
        max_observation_chars: int = 16_000,
    ) -> None:
        self._api, self._limit = load_bfcl(), max_observation_chars
        train = read_cases(self._api, suites)
        heldout = read_cases(self._api, heldout_suites) if heldout_suites else None
        divided = divide(train, heldout, lambda case: case.leak_key, heldout_frac)
        self._pools = {split: [make_task(case, split) for case in cases] for split, cases in divided.items()}
        self._functions = lru_cache(maxsize=None)(self._read_functions)

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, a pure function of its arguments; repeats only once all have been drawn."""
        return draw(self._pools, split, count, seed)

    def tasks(self, split: str) -> list[Task]:
        """Every task of a split, in BFCL's order."""
        return list(self._pools[split])

    def reset(self, task: Task) -> MultiTurnEpisode | SingleTurnEpisode:
        """A fresh episode of a task that `sample` or `tasks` gave."""
        case = case_of(task)
        if case.category not in MULTI_TURN:
            return SingleTurnEpisode(self._api, case)
        classes = cast("Sequence[str]", case.entry["involved_classes"])
        functions = [function for name in classes for function in self._functions(name)]
        return MultiTurnEpisode(self._api, case, functions, self._limit)

    def _read_functions(self, class_name: str) -> list[Record]:
        return read_records(self._api.data / "multi_turn_func_doc" / self._api.function_files[class_name])
