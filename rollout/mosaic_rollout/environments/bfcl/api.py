"""The one door to the installed `bfcl-eval` package: what is used of it, its pinned version, its test cases.

Its data files, its simulated APIs and its two checkers are used, nothing of its model handlers, whose SDKs
weigh 5.9 GB. `ast_checker` asks its table of models whether a model writes "_" for the "." in a function's
name; a table with the answer yes stands in for it while the checker is imported. The folders that
`bfcl_eval.constants.eval_config` makes at import are never asked for.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Protocol, cast

from mosaic_rollout.environments.sources import EnvironmentMissing, payload_as, require_package, text_key
from mosaic_rollout.errors import UserError
from mosaic_rollout.plain_json import read_lines
from mosaic_rollout.types import JsonValue, Message, Task

BFCL_VERSION = "2026.3.23"
INSTALL_HINT = f"run `make bfcl`, or `pip install --no-deps bfcl-eval=={BFCL_VERSION} mpmath==1.3.0`"
MODEL = "mosaic"
"""The name under which `ast_checker` finds a model whose function names have no dots."""

_MODEL_TABLE = "bfcl_eval.constants.model_config"

Record = dict[str, JsonValue]
CheckResult = Mapping[str, object]
"""{"valid": bool, ...}, from either checker."""


class MultiTurnChecker(Protocol):
    """bfcl_eval's multi_turn_checker: runs call texts and compares states and results, a turn at a time."""

    def __call__(
        self,
        multi_turn_model_result_list_decoded: Sequence[Sequence[Sequence[str]]],
        multi_turn_ground_truth_list: Sequence[Sequence[str]],
        test_entry: Mapping[str, object],
        test_category: str,
        model_name: str,
    ) -> CheckResult: ...


class AstChecker(Protocol):
    """bfcl_eval's ast_checker: compares calls with the acceptable values of each argument."""

    def __call__(
        self,
        func_description: Sequence[Mapping[str, object]],
        model_output: Sequence[Mapping[str, Mapping[str, JsonValue]]],
        possible_answer: Sequence[Mapping[str, object]],
        language: object,
        test_category: str,
        model_name: str,
    ) -> CheckResult: ...


@dataclass(frozen=True)
class Bfcl:
    """Handles on the installed package."""

    data: Path
    multi_turn_checker: MultiTurnChecker
    ast_checker: AstChecker
    languages: Mapping[str, object]  # bfcl_eval's Language by value: python, java, javascript
    instances: MutableMapping[str, object]  # where multi_turn_checker keeps the instances it made, by name
    class_modules: Mapping[str, str]
    function_files: Mapping[str, str]  # class -> file in data/multi_turn_func_doc
    stateless_classes: Sequence[str]

    def api_class(self, name: str) -> Callable[[], object]:
        """A simulated API, such as GorillaFileSystem."""
        return getattr(importlib.import_module(self.class_modules[name]), name)


@cache
def load_bfcl() -> Bfcl:
    """Import what is used of bfcl-eval, once. EnvironmentMissing where it, or its version, is not there."""
    require_package("bfcl-eval", BFCL_VERSION, INSTALL_HINT)
    try:
        importlib.import_module("mpmath")  # imported by a simulated API, much later
        backend = importlib.import_module("bfcl_eval.constants.executable_backend_config")
        checker = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
        execution = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils")
        enums = importlib.import_module("bfcl_eval.constants.enums")
        with _model_table():
            ast = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
    except ImportError as error:
        raise EnvironmentMissing(f"bfcl-eval cannot be imported ({error}); {INSTALL_HINT}") from error
    return Bfcl(
        data=Path(str(files("bfcl_eval").joinpath("data"))),
        multi_turn_checker=checker.multi_turn_checker,
        ast_checker=ast.ast_checker,
        languages={language.value: language for language in enums.Language},
        instances=cast("MutableMapping[str, object]", vars(execution)),
        class_modules=backend.CLASS_FILE_PATH_MAPPING,
        function_files=backend.MULTI_TURN_FUNC_DOC_FILE_MAPPING,
        stateless_classes=backend.STATELESS_CLASSES,
    )


@contextmanager
def _model_table() -> Iterator[None]:
    """A table of one model in place of bfcl_eval's own, whose import needs every vendor's SDK."""
    table = ModuleType(_MODEL_TABLE)
    table.__dict__["MODEL_CONFIG_MAPPING"] = {MODEL: SimpleNamespace(underscore_to_dot=True)}
    before = sys.modules.get(_MODEL_TABLE)
    sys.modules[_MODEL_TABLE] = table
    try:
        yield
    finally:
        del sys.modules[_MODEL_TABLE]
        if before is not None:
            sys.modules[_MODEL_TABLE] = before


MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
SINGLE_TURN = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
    "live_relevance",
)
CATEGORIES = MULTI_TURN + SINGLE_TURN


@dataclass(frozen=True)
class Case:
    """One test case: BFCL's own entry, and its ground truth where its category has one."""

    category: str
    entry: Record
    ground_truth: Sequence[JsonValue]  # multi-turn: call texts a turn; single-turn: acceptable calls

    @property
    def case_id(self) -> str:
        return str(self.entry["id"])

    @property
    def turns(self) -> Sequence[Sequence[Message]]:
        """The user's messages; those of the first turn open the conversation."""
        return cast("Sequence[Sequence[Message]]", self.entry["question"])

    @property
    def language(self) -> str:
        return {"simple_java": "java", "simple_javascript": "javascript"}.get(self.category, "python")

    @property
    def leak_key(self) -> str:
        """Cases that share it must not be divided: one scenario in four variants, or one request."""
        if self.category in MULTI_TURN:
            return f"multi_turn scenario {self.case_id.rpartition('_')[2]}"
        return text_key(str(self.turns[0][-1]["content"]))


def read_cases(api: Bfcl, categories: Sequence[str]) -> list[Case]:
    """All cases of some categories, in BFCL's order. UserError for a category that is not among ours."""
    for category in categories:
        if category not in CATEGORIES:
            raise UserError(f"BFCL has no category {category!r} here; there are {', '.join(CATEGORIES)}")
    return [case for category in dict.fromkeys(categories) for case in _read_category(api.data, category)]


def make_task(case: Case, split: str) -> Task:
    return Task(case.case_id, "benign", split, case)


def case_of(task: Task) -> Case:
    """What a task is made of. Raises TypeError for a task of another environment."""
    return payload_as(task, Case, "BFCL")


def read_records(path: Path) -> list[Record]:
    """A file of one JSON object a line."""
    return [json.loads(line) for _, line in read_lines(path)]


def _read_category(data: Path, category: str) -> list[Case]:
    file = f"BFCL_v4_{category}.json"
    answers: Mapping[str, JsonValue] = {}
    if not category.endswith("relevance"):
        answers = {
            str(row["id"]): row["ground_truth"] for row in read_records(data / "possible_answer" / file)
        }
    cases = []
    for entry in read_records(data / file):
        truth = answers.get(str(entry["id"]), [])
        cases.append(Case(category, entry, cast("Sequence[JsonValue]", truth)))
    return cases
