"""The one door to AgentHarm's code in the installed `inspect-evals`: its tools, graders and prompts.

The package is written for the framework `inspect_ai`, of which AgentHarm's tools and graders use a decorator,
four classes and a log: `inspect_ai` need not be installed for them. A file of theirs is executed in a
namespace of its own, each time anew, with an `__import__` that answers what it imports:

- `inspect_ai.tool`, `inspect_ai.model`, `inspect_ai.log`: the stand-ins below;
- other files of AgentHarm: executed in the same way;
- `open` and `os.path.exists`: texts below AgentHarm's own folder only, which its tools name relative to it;
- `random`: a generator of the caller's, so that an episode can be repeated;
- `logging`, `string`, `textwrap`, `typing`: themselves. Anything else is an ImportError.

Nothing enters `sys.modules`. Some tools change variables of their file: executing it anew for every episode
is what keeps episodes apart.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Literal, TextIO, cast

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from mosaic_rollout.environments.sources import EnvironmentMissing, require_package
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import JsonValue, ToolSchema

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


INSPECT_EVALS_VERSION = "0.28.0"
INSTALL_HINT = f"run `make agentharm`, or `pip install --no-deps inspect-evals=={INSPECT_EVALS_VERSION}`"

Part = Literal["harmful", "benign"]
GradingFunction = Callable[[Mapping[str, object], Sequence[ChatMessage]], Awaitable[Mapping[str, float]]]


@dataclass(frozen=True)
class HarmTool:
    """A tool of a fresh file, and how it is told to the policy."""

    schema: ToolSchema
    function: Callable[..., Coroutine[object, None, object]]

    def run(self, arguments: Mapping[str, JsonValue]) -> object:
        """What it returns. TypeError where the arguments do not fit; it may raise anything else."""
        inspect.signature(self.function).bind(**arguments)
        coroutine = self.function(**arguments)
        try:
            coroutine.send(None)
        except StopIteration as stop:
            return stop.value
        finally:
            coroutine.close()
        raise RuntimeError("the tool waits for something")  # none of 0.28.0 does


@cache
def agentharm_folder() -> Path:
    """Where AgentHarm's files lie. EnvironmentMissing where the package is not there in its known version."""
    require_package("inspect-evals", INSPECT_EVALS_VERSION, INSTALL_HINT)
    spec = find_spec("inspect_evals")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "agentharm" / "benchmark").is_dir():
            return Path(place) / "agentharm"
    raise EnvironmentMissing(f"inspect-evals holds no AgentHarm; {INSTALL_HINT}")


def load_tools(part: Part, names: Sequence[str], seed: str) -> dict[str, HarmTool]:
    """Fresh tools by name. UserError names one that the package does not have."""
    source = SourceFolder(agentharm_folder(), random.Random(seed))
    return {name: _tool(source, part, name) for name in names}


def grading_function(part: Part, name: str) -> GradingFunction:
    """AgentHarm's own grader of a behaviour. UserError where the package has none of that name."""
    found = vars(_graders(part)).get(name)
    if not inspect.iscoroutinefunction(found):
        raise UserError(f"inspect-evals {INSPECT_EVALS_VERSION} has no {part} grading function {name!r}")
    return cast(GradingFunction, found)


@cache
def system_message() -> str:
    """What AgentHarm's default agent is told."""
    prompts = SourceFolder(agentharm_folder(), random.Random(0)).execute("prompts")
    return str(prompts.system_prompt_dict["default"])


@cache
def refusal_prompt() -> str:
    """What AgentHarm asks its judge of a message, with {generation} in it.

    Read, not executed: the file it stands in is the rest of inspect_ai's business.
    """
    tree = ast.parse((agentharm_folder() / "scorer.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DEFAULT_REFUSAL_PROMPT":
            return str(ast.literal_eval(node.value))
    raise EnvironmentMissing(f"inspect-evals has no refusal prompt; {INSTALL_HINT}")


@cache
def _graders(part: Part) -> object:
    source = SourceFolder(agentharm_folder(), random.Random(0))
    return source.execute(f"benchmark.{part}_grading_functions")


def _tool(source: SourceFolder, part: Part, name: str) -> HarmTool:
    where = agentharm_folder() / "benchmark" / f"{part}_tools" / f"{name}.py"
    if not name.isidentifier() or not where.is_file():
        raise UserError(f"inspect-evals {INSPECT_EVALS_VERSION} has no {part} tool {name!r}")
    function = getattr(source.execute(f"benchmark.{part}_tools.{name}"), name)()
    function.__name__ = name  # all are called run
    try:
        schema = cast(ToolSchema, get_json_schema(function))
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise UserError(f"the {part} tool {name} cannot be described: {error}") from error
    return HarmTool(schema, function)
