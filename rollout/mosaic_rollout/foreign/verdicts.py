"""Verdicts and numbers that foreign code gives: finite, in range and of Python's plain types, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real

from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Verdict

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
