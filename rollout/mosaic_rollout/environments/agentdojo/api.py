"""The one door to the installed `agentdojo` package: what is used of it, its pinned version, its import.

Some of it is private to AgentDojo (`_check_task_result`, `read_suite_file`), so the version is pinned and
checked. The protocols below are the whole surface used.

`import agentdojo` reaches every LLM SDK it supports (anthropic, cohere, google-genai, openai) through
`agentdojo.agent_pipeline`: 12 seconds, and 50 packages that must be installed. Its suites, tools, tasks,
attacks and checkers use none of them. While AgentDojo is being imported the modules in `REPLACED`, all of
them its own, are answered with modules whose every attribute is an empty class. Nothing outside AgentDojo is
touched. The stand-ins leave `sys.modules` right after; the classes already bound in
`agentdojo.agent_pipeline` stay, and creating one of them says why it is not there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.resources import files
from types import ModuleType
from typing import NoReturn, Protocol, Self, cast

import yaml

from mosaic_rollout.environments.sources import EnvironmentMissing, require_package
from mosaic_rollout.types import JsonValue

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


AGENTDOJO_VERSION = "0.1.35"
INSTALL_HINT = 'run `make train-agentdojo`, or `pip install "mosaic-fast[agentdojo]"`'


class State(Protocol):
    """A suite's world: a pydantic model."""

    def model_copy(self, *, deep: bool = False) -> Self: ...


class Call(Protocol):
    """agentdojo.functions_runtime.FunctionCall."""

    function: str
    args: MutableMapping[str, JsonValue]


class UserTask(Protocol):
    """agentdojo.base_tasks.BaseUserTask."""

    ID: str
    PROMPT: str
    GROUND_TRUTH_OUTPUT: str

    def init_environment(self, environment: State) -> State: ...
    def ground_truth(self, pre_environment: State) -> list[Call]: ...


class InjectionTask(Protocol):
    """agentdojo.base_tasks.BaseInjectionTask."""

    ID: str
    GOAL: str
    GROUND_TRUTH_OUTPUT: str

    def ground_truth(self, pre_environment: State) -> list[Call]: ...


class ModelClass(Protocol):
    """A pydantic model class."""

    def model_json_schema(self) -> dict[str, JsonValue]: ...
    def model_validate(self, obj: object) -> State: ...


class Tool(Protocol):
    """agentdojo.functions_runtime.Function."""

    name: str
    description: str
    parameters: ModelClass


class Suite(Protocol):
    """agentdojo.task_suite.TaskSuite."""

    name: str
    tools: list[Tool]
    environment_type: ModelClass

    @property
    def user_tasks(self) -> Mapping[str, UserTask]: ...
    @property
    def injection_tasks(self) -> Mapping[str, InjectionTask]: ...
    def get_injection_vector_defaults(self) -> dict[str, str]: ...
    def _check_task_result(
        self,
        task: UserTask | InjectionTask,
        model_output: Sequence[Mapping[str, str]],
        pre_environment: State,
        task_environment: State,
        functions_stack_trace: Sequence[Call],
    ) -> bool: ...


class Attack(Protocol):
    """agentdojo.attacks.BaseAttack."""

    is_dos_attack: bool

    def attack(self, user_task: UserTask, injection_task: InjectionTask) -> dict[str, str]: ...


class Runtime(Protocol):
    """agentdojo.functions_runtime.FunctionsRuntime."""

    def run_function(
        self, env: State, function: str, kwargs: Mapping[str, object]
    ) -> tuple[object, str | None]: ...


@dataclass(frozen=True)
class AgentDojo:
    """Handles on the installed package."""

    suites: Callable[[str], Mapping[str, Suite]]  # of a benchmark version; empty where there is none
    attacks: Mapping[str, Callable[[Suite, object], Attack]]
    make_pipeline: Callable[[None], object]  # a pipeline that only carries a name, which attacks ask for
    make_runtime: Callable[[Sequence[Tool]], Runtime]
    make_call: Callable[..., Call]
    result_text: Callable[[object], str]
    read_suite_file: Callable[[str, str, None], str]
    system_message: str


@cache
def load_agentdojo() -> AgentDojo:
    """Import AgentDojo (about one second, once).

    Raises EnvironmentMissing where it, or a module it needs, is not installed, or its version is another one.
    """
    require_package("agentdojo", AGENTDOJO_VERSION, INSTALL_HINT)
    try:
        with stand_ins():
            attacks = importlib.import_module("agentdojo.attacks.attack_registry")
            importlib.import_module("agentdojo.attacks")  # registers the attacks
            load_suites = importlib.import_module("agentdojo.task_suite.load_suites")
            task_suite = importlib.import_module("agentdojo.task_suite.task_suite")
            runtime = importlib.import_module("agentdojo.functions_runtime")
            ground_truth = importlib.import_module("agentdojo.agent_pipeline.ground_truth_pipeline")
            execution = importlib.import_module("agentdojo.agent_pipeline.tool_execution")
    except ImportError as error:
        raise EnvironmentMissing(f"agentdojo cannot be imported ({error}); {INSTALL_HINT}") from error
    messages = yaml.safe_load(files("agentdojo").joinpath("data/system_messages.yaml").read_text("utf-8"))
    return AgentDojo(
        suites=cast("Callable[[str], Mapping[str, Suite]]", load_suites.get_suites),
        attacks=attacks.ATTACKS,
        make_pipeline=ground_truth.GroundTruthPipeline,
        make_runtime=runtime.FunctionsRuntime,
        make_call=runtime.FunctionCall,
        result_text=execution.tool_result_to_str,
        read_suite_file=task_suite.read_suite_file,
        system_message=messages["default"],
    )
