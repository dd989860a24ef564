"""Running foreign code: plain or async, in place, and with whatever it raises put into words.

What a tool raises becomes text for the policy (`report`); what a judge, a reset or a verdict raises ends the
run, as a UserError of one line (`demand`). Only KeyboardInterrupt passes through: SystemExit, which argparse
raises inside of many a tool, is an error like another.
"""

from __future__ import annotations

import inspect
import sys
import threading
import traceback
from collections.abc import Callable
from typing import cast

from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign.loop_thread import no_running_loop, shared_loop
from mosaic_rollout.foreign.raised import place, place_of, words, written


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


def show_first(name: str, error: BaseException) -> None:
    """A traceback on stderr, with what becomes of it and of those that will not be shown."""
    try:
        text = "".join(traceback.format_exception(error)).rstrip()
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  an exception of a user's may refuse to be looked at
        text = words(error)
    print(
        f"{text}\n{name}: a tool raised the above; the policy is shown it as an error. "
        "Further ones are only counted, in env/tool_errors.",
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


def _name(function: Callable[..., object]) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__)
