"""MOSAIC training of tool-using agents: what scripts and notebooks import (docs/api.md).

Nothing is imported until it is asked for: `import mosaic_fast` is quick and needs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mosaic_fast.api import Run, evaluate, load_run, train
    from mosaic_fast.config import Config
    from mosaic_fast.errors import TrainingError, UserError
    from mosaic_fast.policy import Policy

__all__ = ["Config", "Policy", "Run", "TrainingError", "UserError", "evaluate", "load_run", "train"]

_MODULES = {
    "Config": "config",
    "Policy": "policy",
    "Run": "api",
    "TrainingError": "errors",
    "UserError": "errors",
    "load_run": "api",
}


def __getattr__(name: str) -> object:
    """Import what is asked for, and no more."""
    if name in ("train", "evaluate"):  # modules, which can be called
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallableModule(ModuleType):
    """A module that is called as the function of api.py with its name.

    `mosaic_fast.train` is a module, since `python -m mosaic_fast.train` runs it, and it is what scripts call.
    The import of a submodule binds its name in the package, whatever was bound there before, so the two have
    to be one object.
    """

    def __call__(self, *arguments: object, **options: object) -> object:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"{__package__}.api"), name)(*arguments, **options)


def make_callable(module: str) -> None:
    """Let a module of this package be called as the function of api.py with its name."""
    sys.modules[module].__class__ = _CallableModule
