"""A parsed call as the Python text that BFCL's multi-turn checker evaluates.

The text is built here from a function name that the episode has and from JSON values, and holds nothing else:
what the policy wrote never reaches `eval`.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping, Sequence

from mosaic_rollout.types import JsonValue, ToolCall

MAX_DIGITS = 1000
"""Digits of what asks for a precision or for decimal places, and of a power; above, a call need not end."""


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
