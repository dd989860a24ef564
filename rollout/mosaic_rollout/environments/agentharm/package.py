"""The one door to AgentHarm's code in the installed `inspect-evals`: its tools, graders and prompts."""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from mosaic_rollout.environments.agentharm.stand_ins import ChatMessage, SourceFolder
from mosaic_rollout.environments.user_data import EnvironmentMissing, require_package
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import JsonValue, ToolSchema

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
