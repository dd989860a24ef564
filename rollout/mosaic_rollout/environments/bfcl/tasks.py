"""BFCL's test cases, read from the installed package, and what they have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mosaic_rollout.environments.bfcl.api import Bfcl, Record
from mosaic_rollout.environments.splits import text_key
from mosaic_rollout.errors import UserError
from mosaic_rollout.plain_json import read_lines
from mosaic_rollout.types import JsonValue, Message, Task

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
    if not isinstance(task.payload, Case):
        raise TypeError(f"{task.task_id} is not a BFCL task")
    return task.payload


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
