"""A parsed call as the Python text that BFCL's multi-turn checker evaluates.

The text is built here from a function name that the episode has and from JSON values, and holds nothing else:
what the policy wrote never reaches `eval`.

One single-turn BFCL task being acted on: calls are collected and compared, not run.
"""

from __future__ import annotations

import copy
import keyword
import math
import re
from collections.abc import Mapping, Sequence
from typing import cast

from mosaic_rollout.environments.bfcl.api import MODEL, Bfcl, Record
from mosaic_rollout.environments.bfcl.schemas import tool_schema
from mosaic_rollout.environments.bfcl.tasks import Case
from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.types import JsonValue, Observation, ToolCall, Verdict

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
