"""What a user's `module:Class` names."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.code import get_method
from mosaic_rollout.foreign.raised import place, words, written


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
