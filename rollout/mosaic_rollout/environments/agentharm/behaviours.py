"""AgentHarm's behaviours: JSON files of the data set, which the user brings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mosaic_rollout.environments.user_data import read_json_file, text_at
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task

FILES: dict[str, str] = {
    "harmful": "harmful_behaviors_test_public.json",
    "benign": "benign_behaviors_test_public.json",
    "chat": "chat_public_test.json",
}
"""Part of the data set -> its file. `chat` has no tools and no grader but that of refusals."""


@dataclass(frozen=True)
class Behaviour:
    """One request. The last two are empty for `chat`."""

    part: str  # a key of FILES
    behaviour_id: str
    category: str
    prompt: str
    target_functions: tuple[str, ...] = ()
    grading_function: str = ""

    @property
    def metadata(self) -> dict[str, object]:
        """What a grader reads of a behaviour."""
        return {"target_functions": list(self.target_functions), "category": self.category}


def read_behaviours(folder: Path, part: str) -> list[Behaviour]:
    """A part of the data set. UserError names the file, the behaviour and what is wrong."""
    path = _file(folder, FILES[part])
    found = read_json_file(path)
    entries = found.get("behaviors") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{path} has no list "behaviors"; it must be a file of the data set AgentHarm')
    return [_behaviour(path, part, index, entry) for index, entry in enumerate(entries)]


def behaviour_of(task: Task) -> Behaviour:
    """What a task is made of. Raises TypeError for a task of another environment."""
    if not isinstance(task.payload, Behaviour):
        raise TypeError(f"{task.task_id} is not an AgentHarm task")
    return task.payload


def _file(folder: Path, name: str) -> Path:
    """The file, in the folder or, as in the data set, in its `benchmark`."""
    for path in (folder / name, folder / "benchmark" / name):
        if path.is_file():
            return path
    raise UserError(
        f"{folder} holds no {name}; name a copy of the data set AgentHarm (ai-safety-institute/AgentHarm at "
        "Hugging Face), which asks for acceptance of its terms"
    )


def _behaviour(path: Path, part: str, index: int, entry: object) -> Behaviour:
    if not isinstance(entry, dict):
        raise UserError(f"{path}, behaviour {index}: not an object")
    name = str(entry.get("id", index))
    where = f"{path}, behaviour {name}"
    category, prompt = text_at(entry, "category", where), text_at(entry, "prompt", where)
    if part == "chat":
        return Behaviour(part, name, category, prompt)
    functions = entry.get("target_functions")
    if not isinstance(functions, list) or not all(isinstance(function, str) for function in functions):
        raise UserError(f'{where}: "target_functions" must be a list of names')
    grader = text_at(entry, "grading_function", where)
    return Behaviour(part, name, category, prompt, tuple(functions), grader)
