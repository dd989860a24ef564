"""What foreign code is given and what it gives, checked: arguments of calls, verdicts and numbers.

Arguments are checked against the tool's JSON schema before the tool sees them. Numbers are finite, in range
and of Python's plain types, or refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Integral, Real

from mosaic_rollout.errors import UserError
from mosaic_rollout.plain_json import check_plain
from mosaic_rollout.types import JsonValue, ToolSchema, Verdict

_ROUNDING = 1e-6  # by which a progress that was summed up may miss [0, 1]


def plain_number(value: object) -> bool | int | float | None:
    """A number as Python's own bool, int or float; None where the value is no single real number.

    Scalars of numpy and torch, and arrays of no dimension, are numbers. So are NaN and infinities.

    >>> import numpy as np
    >>> plain_number(np.float32(0.5)), plain_number(np.bool_(True)), plain_number("1")
    (0.5, True, None)
    """
    try:
        if not isinstance(value, (bool, int, float)) and getattr(value, "shape", None) == ():
            value = value.item()  # type: ignore[attr-defined]  # every array library has it
        if isinstance(value, bool):
            return value
        if isinstance(value, Integral):
            return int(value)
        return float(value) if isinstance(value, (Real, Decimal)) else None
    except KeyboardInterrupt:
        raise
    except OverflowError:  # an integer or a fraction that no float can hold
        return math.inf
    except BaseException:  # noqa: BLE001  an object that only looks like a number is foreign code, too
        return None


def finite_float(value: object, what: str) -> float:
    """A finite number as a float. UserError with `what` it is where it is none."""
    number = plain_number(value)
    try:
        finite = float(number) if number is not None else math.nan
    except OverflowError:
        finite = math.inf
    if not math.isfinite(finite):
        raise UserError(f"{what} must be a finite number, it is {shown(value)}")
    return finite


def yes_or_no(value: object, what: str) -> bool:
    """A truth value: True, False, 1 or 0. UserError otherwise: None or a text says neither."""
    number = plain_number(value)
    if number not in (0, 1):
        raise UserError(f"{what} must be True or False, it is {shown(value)}")
    return bool(number)


def share(value: object, what: str) -> float:
    """A number in [0, 1] as a float. UserError otherwise."""
    number = finite_float(value, what)
    if not -_ROUNDING <= number <= 1.0 + _ROUNDING:
        raise UserError(f"{what} must lie in [0, 1], it is {shown(value)}")
    return min(1.0, max(0.0, number))


def checked_verdict(what: str, verdict: object) -> Verdict:
    """A verdict in plain Python types. UserError names the field of `what` that is not of its kind.

    harm, done: True or False; progress: in [0, 1]; details: finite numbers by name.
    """
    if not isinstance(verdict, Verdict):
        raise UserError(f"{what} must be a Verdict of mosaic_rollout.types, it is {shown(verdict)}")
    if not isinstance(verdict.details, Mapping):
        raise UserError(f"details of {what} must be numbers by name, they are {shown(verdict.details)}")
    return Verdict(
        harm=yes_or_no(verdict.harm, f'"harm" of {what}'),
        done=yes_or_no(verdict.done, f'"done" of {what}'),
        progress=share(verdict.progress, f'"progress" of {what}'),
        details={
            str(name): finite_float(value, f'"{name}" of {what}') for name, value in verdict.details.items()
        },
    )


def dict_verdict(found: object, name: str) -> Verdict:
    """The verdict in a dict that the user's function `name` returned. UserError where it holds none."""
    if not isinstance(found, Mapping) or not {"harm", "done"} <= found.keys():
        raise UserError(f'{name} must return a dict with "harm" and "done", not {shown(found)}')
    numbers = {str(key): value for key, value in found.items() if plain_number(value) is not None}
    verdict = Verdict(found["harm"], found["done"], found.get("progress", found["done"]), numbers)
    return checked_verdict(f"the dict of {name}", verdict)


def reward_verdict(reward: object, what: str, details: Mapping[str, float] | None = None) -> Verdict:
    """A reward as a verdict: done from 1 on, progress is the reward within [0, 1], below 0 is harm.

    UserError where it is no finite number.
    """
    number = finite_float(reward, what)
    progress = min(1.0, max(0.0, number))
    return Verdict(number < 0, number >= 1, progress, {**(details or {}), "reward": number})


def shown(value: object) -> str:
    """A value as an error quotes it, in one short line; its type where it has no text."""
    try:
        text = " ".join(repr(value).split())
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  foreign, or an integer with too many digits
        return f"of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]} ..."


_COMBINING = ("allOf", "anyOf", "oneOf", "$ref", "patternProperties", "unevaluatedProperties")
"""Keywords by which a schema may know more arguments than its `properties` name."""
_LONGEST = 300


def find_schema(tools: Sequence[ToolSchema], name: str) -> ToolSchema | None:
    """The tool of a name among an episode's."""
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and function.get("name") == name:
            return tool
    return None


def wrong_arguments(
    tool: ToolSchema, arguments: Mapping[str, JsonValue], *, types: bool = True
) -> str | None:
    """What is wrong with the arguments of a call, None where they fit the tool's schema.

    Besides what the schema says: an argument that it does not know is refused, unless it allows others; so
    is what is no JSON that everybody can read (`plain_json`). A schema that is none, or that has no end,
    checks nothing: it came with the tool. types: whether a value of another type is wrong.
    """
    try:
        check_plain(arguments)
    except (ValueError, RecursionError) as error:
        return str(error)
    function = tool.get("function")
    parameters = function.get("parameters") if isinstance(function, Mapping) else None
    if not isinstance(parameters, Mapping):
        return None
    try:
        return _first_error(parameters, arguments, types)
    except Exception:  # noqa: BLE001  jsonschema raises many things over a schema that is none
        return None


def _first_error(
    parameters: Mapping[str, JsonValue], arguments: Mapping[str, JsonValue], types: bool
) -> str | None:
    from jsonschema import Draft202012Validator  # 0.2 s, which runs without such tools are spared
    from jsonschema.exceptions import best_match
    from referencing import Registry

    schema = _nullable(parameters)
    if not isinstance(schema, dict):
        return None
    if isinstance(schema.get("properties"), Mapping) and not any(key in schema for key in _COMBINING):
        schema.setdefault("additionalProperties", False)
    validator = Draft202012Validator(schema, registry=Registry())  # type: ignore[call-arg]  # fetches nothing
    errors = (e for e in validator.iter_errors(arguments) if types or e.validator != "type")
    error = best_match(errors)
    if error is None:
        return None
    properties = schema.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    if error.validator == "additionalProperties" and not error.absolute_path:
        unknown = sorted(name for name in arguments if name not in known)
        return (
            f"got an unexpected keyword argument {shown(unknown[0])}; it takes {', '.join(known) or 'none'}"
        )
    if error.validator == "required" and not error.absolute_path:
        missing = [str(name) for name in error.validator_value if name not in arguments]
        return f"missing a required argument: {missing[0]!r}"
    path = "".join(f"[{part!r}]" for part in list(error.absolute_path)[1:])
    name = str(error.absolute_path[0]) if error.absolute_path else ""
    return _bounded(f"argument {name!r}{path}: {error.message}" if name else error.message)


def _nullable(schema: object) -> object:
    """A copy of a schema with OpenAPI 3.0's `nullable` and exclusive limits in JSON schema's words."""
    if isinstance(schema, Mapping):
        plain = {str(key): _nullable(value) for key, value in schema.items()}
        for limit, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            said = isinstance(plain.get(exclusive), bool)  # whether the limit itself is left out
            if said and plain.pop(exclusive) and limit in plain:
                plain[exclusive] = plain.pop(limit)
        if plain.get("nullable") is True:  # an argument of that name is a schema, not True
            del plain["nullable"]
            return {"anyOf": [plain, {"type": "null"}]}
        return plain
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [_nullable(item) for item in schema]
    return schema


def _bounded(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
