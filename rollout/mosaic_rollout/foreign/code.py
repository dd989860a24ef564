"""Running foreign code: plain or async, in place, and with whatever it raises put into words.

What a tool raises becomes text for the policy (`report`); what a judge, a reset or a verdict raises ends the
run, as a UserError of one line (`demand`), with the file and line of the user's own code. Only
KeyboardInterrupt passes through: SystemExit, which argparse raises inside of many a tool, is an error like
another.

What is awaited is awaited in one event loop in a thread, and code that is called runs where it may start an
event loop of its own.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TypeVar, cast

from mosaic_rollout.errors import UserError

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


Result = TypeVar("Result")
_STARTING = threading.Lock()


class LoopThread:
    """An event loop that runs in a daemon thread, for as long as the process does."""

    def __init__(self, name: str = "foreign code") -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True, name=name).start()

    def run(self, work: Awaitable[Result]) -> Result:
        """Await there, wait here. Raises what the work raises, also what would end the loop (SystemExit)."""
        result, error = asyncio.run_coroutine_threadsafe(caught(work), self.loop).result()
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # there is one where nothing was raised


def shared_loop() -> LoopThread:
    """The process's event loop for foreign code, started when it is first asked for."""
    with _STARTING:
        return _loop_of(os.getpid())  # a forked process has the object, but not the thread


@cache
def _loop_of(process: int) -> LoopThread:
    return LoopThread()


async def caught(work: Awaitable[Result]) -> tuple[Result | None, BaseException | None]:
    """The result of the work, or what it raised, whatever that is: nothing of it reaches the loop."""
    try:
        return await work, None
    except BaseException as error:  # noqa: BLE001  raised again where the result is waited for
        return None, error


@contextmanager
def no_running_loop() -> Iterator[None]:
    """Within it, this thread runs no event loop as far as asyncio knows: `asyncio.run` may be called.

    The loop that does run here waits meanwhile, as it does for any function that is called.
    """
    loop = asyncio._get_running_loop()
    if loop is None:
        yield
        return
    task = asyncio.current_task(loop)
    if task is not None:
        asyncio.tasks._leave_task(loop, task)
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)
        if task is not None:
            asyncio.tasks._enter_task(loop, task)


_STRAY = (StopIteration, GeneratorExit, SystemExit, asyncio.CancelledError)
"""What a future cannot hold, or what would end the task that waits for it, or the process."""


def in_thread(work: Callable[[], Result], name: str) -> asyncio.Future[Result]:
    """The result of foreign code that runs in a thread of its own, to be awaited here, or given up."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def deliver(result: Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(Result, result))

    def run() -> None:
        result, error = None, cast("BaseException | None", None)
        try:
            result = work()
        except _STRAY as stray:
            error = RuntimeError(f"{name} raised {type(stray).__name__}: {stray}")
        except BaseException as raised:  # noqa: BLE001  raised again where the result is awaited
            error = raised
        with suppress(RuntimeError):  # closed: the run has ended without waiting for this
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=run, daemon=True, name=name).start()
    return future


class BrokenContract(UserError):
    """Foreign code gave something that is not of the documented kind: the run ends, even where a tool did."""


class ForeignCode:
    """The code of one environment or judge.

    name: how errors call it, for example `env.name 'bank:Bank'`. of_user: it is the user's own, so reports
    name its file and line, and the first traceback is shown. All awaitables of a process are awaited in one
    event loop (`shared_loop`), so that clients and locks which live in it may be kept and shared.
    """

    def __init__(self, name: str, *, of_user: bool = True) -> None:
        self.name, self._of_user = name, of_user
        self._lock = threading.Lock()
        self._shown = not of_user

    def run(self, function: Callable[..., object], /, *args: object, **kwargs: object) -> object:
        """What a call gives, awaited where it is to be awaited. Raises whatever it raises.

        TypeError for a generator, which has done nothing yet.
        """
        with no_running_loop():
            result = function(*args, **kwargs)
            if inspect.isawaitable(result):
                result = shared_loop().run(result)
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise TypeError(f"{_name(function)} gave a generator; it must return its value")
        return result

    def demand(
        self, what: str, function: Callable[..., object], /, *args: object, **kwargs: object
    ) -> object:
        """What a call gives that the run cannot do without. UserError says what failed, why and where."""
        try:
            return self.run(function, *args, **kwargs)
        except (KeyboardInterrupt, UserError):
            raise
        except BaseException as error:
            where = place(error) or place_of(function)
            raise UserError(f"{what} failed: {words(error)}{written(where, whole_path=True)}") from error

    def report(self, error: BaseException) -> str:
        """What a tool raised, as the policy is told it. The first traceback of the user's code is shown."""
        if not self._of_user:
            return words(error)
        with self._lock:
            first, self._shown = not self._shown, True
        if first:
            show_first(self.name, error)
        return words(error) + written(place(error), whole_path=False)


TOOL_RAISED = (
    "a tool raised the above; the policy is shown it as an error. Further ones are only counted, in "
    "env/tool_errors."
)


def show_first(name: str, error: BaseException, becomes: str = TOOL_RAISED) -> None:
    """A traceback on stderr, with what becomes of it and of those that will not be shown."""
    try:
        text = "".join(traceback.format_exception(error)).rstrip()
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  an exception of a user's may refuse to be looked at
        text = words(error)
    print(
        f"{text}\n{name}: {becomes}",
        file=sys.stderr,
        flush=True,
    )


def get_member(owner: object, name: str, what: str) -> object:
    """An attribute of a user's object, None where there is none. UserError where looking it up raises."""
    try:
        return getattr(owner, name)
    except AttributeError:
        return None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(
            f"{what}.{name} cannot be read: {words(error)}{written(place(error), whole_path=True)}"
        ) from error


def get_method(owner: object, name: str, what: str) -> Callable[..., object] | None:
    """A method of a user's object, None where there is none to call."""
    found = get_member(owner, name, what)
    return cast("Callable[..., object]", found) if callable(found) else None


def import_named(spec: str, key: str) -> Callable[..., object]:
    """The class or function that spec `module:Class` names; the working directory is searched first.

    UserError with the configuration's key where there is no such module or nothing callable by that name.
    """
    module_name, _, class_name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    _refuse_clash(spec, key, module_name, Path(here))
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's module may raise anything while it is imported, or exit
        where = written(place(error), whole_path=True)
        raise UserError(f"{key} {spec!r}: cannot import {module_name!r} ({words(error)}){where}") from error
    named = get_method(module, class_name, f"{key} {spec!r}: {module_name}")
    if named is None:
        public = [name for name, value in vars(module).items() if inspect.isclass(value)]
        there = f"; there are {', '.join(public)}" if public else ""
        raise UserError(f"{key} {spec!r}: {module_name} has no class {class_name!r}{there}")
    return named


def call_named(spec: str, key: str, named: Callable[..., object]) -> object:
    """What `named()` gives; what it raises becomes a UserError with the configuration's key."""
    name = str(getattr(named, "__name__", spec))
    return ForeignCode(f"{key} {spec!r}").demand(f"{key} {spec!r}: {name}()", named)


def _refuse_clash(spec: str, key: str, module_name: str, here: Path) -> None:
    """UserError for a file of the user's that Python's own module of the same name would be taken for."""
    top = module_name.partition(".")[0]
    file = next((p for p in (here / f"{top}.py", here / top / "__init__.py") if p.is_file()), None)
    if top in sys.stdlib_module_names and file is not None:
        raise UserError(f"{key} {spec!r}: {file} has the name of a module of Python itself; rename it")


def _name(function: Callable[..., object]) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__)
