"""What foreign code raised, in words: one line, with the file and line of the user's own code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

_OURS = ("mosaic_rollout", "mosaic_fast", "mosaic_kernels")
_INSTALLED = ("site-packages", "dist-packages")
_LONGEST_CHAIN = 20  # of exceptions that caused each other, which may be a ring
_LONGEST = 600  # characters of an exception's own text; what a tool raised may quote a whole file


def text_of(error: BaseException) -> str:
    """An exception's own text, bounded; where it cannot be had, that it cannot."""
    try:
        text = str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as second:  # noqa: BLE001  __str__ is foreign code, too
        return f"its text cannot be shown, {type(second).__name__} was raised"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def words(error: BaseException) -> str:
    """`KeyError: 'x'` in one line. An exception whose text cannot be had is named by its type.

    >>> words(ValueError("no such\\n  file"))
    'ValueError: no such file'
    """
    kind, text = type(error).__name__, " ".join(text_of(error).split())
    return f"{kind}: {text}" if text else kind


def place(error: BaseException) -> tuple[str, int] | None:
    """File and line of the user's own code in which an exception was raised, or that called what raised it.

    The last frame of the traceback that is neither ours nor the standard library's nor an installed
    package's, of the exception or else of what caused it; where there is none, the last installed package's;
    None where there is none either.
    """
    installed: tuple[str, int] | None = None
    cause: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if cause is None:
            break
        if isinstance(cause, SyntaxError) and cause.filename and cause.lineno:
            return cause.filename, cause.lineno
        own, other = _last_frames(cause.__traceback__)
        if own is not None:
            return own
        installed = installed or other
        cause = cause.__cause__ or cause.__context__
    return installed


def place_of(function: Callable[..., object]) -> tuple[str, int] | None:
    """Where a function or a method is defined; None where that cannot be known."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return None if code is None else (str(code.co_filename), int(code.co_firstlineno))


def written(where: tuple[str, int] | None, *, whole_path: bool) -> str:
    """A place as text to put behind words: ` (bank.py, line 12)`; empty where there is none."""
    if where is None:
        return ""
    file, line = where
    return f" ({file if whole_path else Path(file).name}, line {line})"


def _last_frames(trace: TracebackType | None) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """File and line of the last frame of the user's own code, and of the last one of an installed package."""
    own: tuple[str, int] | None = None
    installed: tuple[str, int] | None = None
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        file = trace.tb_frame.f_code.co_filename
        if name in _OURS or name in sys.stdlib_module_names or file.startswith("<frozen"):
            pass
        elif any(part in Path(file).parts for part in _INSTALLED):
            installed = (file, trace.tb_lineno)
        else:
            own = (file, trace.tb_lineno)
        trace = trace.tb_next
    return own, installed
