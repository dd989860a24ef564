"""What a user's `module:Class` names."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from mosaic_rollout.errors import UserError


def import_named(spec: str, key: str) -> Callable[..., object]:
    """The class or function that spec `module:Class` names; the working directory is searched first.

    UserError with the configuration's key where there is no such module or nothing callable by that name.
    """
    module_name, _, class_name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        detail = f"{type(error).__name__}: {error}"
        raise UserError(f"{key} {spec!r}: cannot import {module_name!r} ({detail})") from error
    named = getattr(module, class_name, None)
    if not callable(named):
        public = [name for name, value in vars(module).items() if inspect.isclass(value)]
        there = f"; there are {', '.join(public)}" if public else ""
        raise UserError(f"{key} {spec!r}: {module_name} has no class {class_name!r}{there}")
    return named


def call_named(spec: str, key: str, named: Callable[..., object]) -> object:
    """What `named()` gives; what it raises becomes a UserError with the configuration's key."""
    try:
        return named()
    except Exception as error:  # a user's code may raise anything
        name = getattr(named, "__name__", spec)
        raise UserError(f"{key} {spec!r}: {name}() failed: {type(error).__name__}: {error}") from error
