"""Empty stand-ins for the parts of AgentDojo that talk to LLM providers, so that its import takes one second.

`import agentdojo` reaches every LLM SDK it supports (anthropic, cohere, google-genai, openai) through
`agentdojo.agent_pipeline`: 12 seconds, and 50 packages that must be installed. Its suites, tools, tasks,
attacks and checkers use none of them. While AgentDojo is being imported the modules in `REPLACED`, all of
them its own, are answered with modules whose every attribute is an empty class. Nothing outside AgentDojo is
touched. The stand-ins leave `sys.modules` right after; the classes already bound in
`agentdojo.agent_pipeline` stay, and creating one of them says why it is not there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

REPLACED = ("agentdojo.agent_pipeline.agent_pipeline", "agentdojo.agent_pipeline.llms")


class _StandIn(ModuleType):
    """A module that has every public name, each of them an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> NoReturn:
            raise RuntimeError(
                f"{self.__name__}.{name} was left out when mosaic_rollout imported agentdojo; to use it, "
                "import agentdojo first, with its LLM packages installed"
            )

        empty = type(name, (), {"__new__": refuse, "__module__": self.__name__})
        setattr(self, name, empty)
        return empty


class _Finder(MetaPathFinder, Loader):
    """Answers for the modules in `REPLACED` and everything below them."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in REPLACED):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.made.append(spec.name)
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def stand_ins() -> Iterator[None]:
    """Answer imports of the modules in `REPLACED` with stand-ins; outside the block everything is as before.

    A process that has imported AgentDojo's pipeline already keeps it: then nothing is replaced.
    """
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)
