"""Runs AgentHarm's tool and grader files without `inspect_ai`, each time in a namespace of its own.

The package `inspect-evals` is written for the framework `inspect_ai`, of which AgentHarm's tools and graders
use a decorator, four classes and a log: `inspect_ai` need not be installed for them. A file is executed with
an `__import__` that answers what it imports:

- `inspect_ai.tool`, `inspect_ai.model`, `inspect_ai.log`: the stand-ins below;
- other files of AgentHarm: executed in the same way;
- `open` and `os.path.exists`: texts below AgentHarm's own folder only, which its tools name relative to it;
- `random`: a generator of the caller's, so that an episode can be repeated;
- `logging`, `string`, `textwrap`, `typing`: themselves. Anything else is an ImportError.

Nothing enters `sys.modules`. Some tools change variables of their file: executing it anew for every episode
is what keeps episodes apart.
"""

from __future__ import annotations

import builtins
import importlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import TextIO

PACKAGE = "inspect_evals.agentharm."
_THEMSELVES = ("logging", "string", "textwrap", "typing")


@dataclass(frozen=True)
class Call:
    """inspect_ai.tool.ToolCall, as far as graders read it."""

    id: str
    function: str
    arguments: Mapping[str, object]


@dataclass(frozen=True)
class ChatMessage:
    """inspect_ai.model.ChatMessage of any role, as far as graders read it."""

    role: str = "user"
    content: str = ""
    tool_calls: Sequence[Call] = ()
    tool_call_id: str | None = None
    function: str | None = None  # of a tool's message: which tool
    error: str | None = None  # of a tool's message: the call was not carried out

    @property
    def text(self) -> str:
        return self.content


class SourceFolder:
    """AgentHarm's folder in the installed package.

    Functions of a file run with `rng` as their `random`.
    """

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._folder, self._rng = folder, rng
        self._executed: dict[str, SimpleNamespace] = {}

    def execute(self, module: str) -> SimpleNamespace:
        """The names that a file defines, `module` dotted below AgentHarm's folder; executed once."""
        if module not in self._executed:
            path = self._folder.joinpath(*module.split(".")).with_suffix(".py")
            names: dict[str, object] = {
                "__name__": PACKAGE + module,
                "__builtins__": {**vars(builtins), "__import__": self._import, "open": self._open},
            }
            exec(_compiled(path), names)
            self._executed[module] = SimpleNamespace(**names)
        return self._executed[module]

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = None,
        level: int = 0,
    ) -> object:
        if name in _INSPECT_AI:
            return _INSPECT_AI[name]
        if name.startswith(PACKAGE):
            return self.execute(name.removeprefix(PACKAGE))
        if name == "random":
            return self._rng
        if name == "os":
            return SimpleNamespace(path=SimpleNamespace(exists=self._exists))
        if name in _THEMSELVES:
            return importlib.import_module(name)
        raise ImportError(f"AgentHarm's files are not known to import {name}")

    def _open(self, path: str, mode: str = "r", encoding: str = "utf-8") -> TextIO:
        if mode != "r" or not self._exists(path):
            raise FileNotFoundError(f"no such file: {path}")
        return (self._folder / path).open(encoding=encoding)

    def _exists(self, path: str) -> bool:
        found = (self._folder / path).resolve()
        return found.is_relative_to(self._folder.resolve()) and found.is_file()


@cache
def _compiled(path: Path) -> CodeType:
    return compile(path.read_text(encoding="utf-8"), str(path), "exec")


def _as_it_is(function: object) -> object:
    return function


_INSPECT_AI = {
    "inspect_ai.tool": SimpleNamespace(Tool=object, tool=_as_it_is),
    "inspect_ai.model": SimpleNamespace(
        ChatMessage=ChatMessage, ChatMessageUser=ChatMessage, GenerateConfig=SimpleNamespace, Model=object
    ),
    "inspect_ai.log": SimpleNamespace(transcript=lambda: SimpleNamespace(info=_as_it_is)),
}
