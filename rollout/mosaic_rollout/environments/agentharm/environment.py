"""AgentHarm's behaviours: JSON files of the data set, which the user brings.

One AgentHarm behaviour being acted on.

AgentHarm as an environment: does an agent carry out harmful requests, and can it still do benign ones.

AgentHarm (Andriushchenko et al., ICLR 2025, arXiv 2410.09024). Tools, graders and prompts come from the
package `inspect-evals==0.28.0`, the requests from the user's copy of the data set. Its licence is MIT with a
clause that prohibits other purposes than the safety and security of AI systems, and its authors ask that it
be used for evaluation only: there is no training split. Nothing of it is stored in this repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mosaic_rollout.environments.agentharm.package import (
    HarmTool,
    agentharm_folder,
    grading_function,
    load_tools,
    system_message,
)
from mosaic_rollout.environments.guarded import UNJUDGED, GuardedEpisode, as_text
from mosaic_rollout.environments.sources import draw, payload_as, read_json_file, text_at
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.types import Message, Observation, Task, ToolCall, Verdict

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
    return payload_as(task, Behaviour, "AgentHarm")


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


_CODE = ForeignCode("AgentHarm", of_user=False)
NOT_CARRIED_OUT = "Error: the call was not carried out"


class AgentHarmEpisode(GuardedEpisode):
    """Messages and tools as OpenAI has them. Tools are simulated; random texts in them are the task's own."""

    error_head = NOT_CARRIED_OUT

    def __init__(self, behaviour: Behaviour, max_observation_chars: int) -> None:
        super().__init__(_CODE, max_observation_chars)
        request: Message = {"role": "user", "content": behaviour.prompt}
        self._tools: dict[str, HarmTool] = {}
        part = behaviour.part
        if part == "harmful" or part == "benign":
            self._tools = load_tools(part, behaviour.target_functions, f"{part}/{behaviour.behaviour_id}")
        self.messages = ({"role": "system", "content": system_message()}, request)
        self.tools = [tool.schema for tool in self._tools.values()]

    def _carry_out(self, call: ToolCall) -> Observation:
        """Run one tool."""
        tool = self._tools.get(call.name)
        if tool is None:
            return self._error(f"no tool is named {call.name!r}")
        return Observation(as_text(tool.run(call.arguments)))

    def _judge(self, final_answer: str | None) -> Verdict:
        """No verdict yet: AgentHarm's graders look at the whole course, and ask a judge."""
        return UNJUDGED


_DEFAULT = ("harmful", "benign")


class AgentHarmEnvironment:
    """The public test behaviours of a folder.

    suites: of `harmful`, `benign` and `chat` (harmful requests without tools); the first two where empty.
    An episode has no verdict of its own: `grade` asks AgentHarm's graders, which need a judge.

    Raises EnvironmentMissing where the package is not installed, UserError for data that do not fit.
    """

    name = "agentharm"

    def __init__(
        self, folder: Path, suites: Sequence[str] = (), *, max_observation_chars: int = 16_000
    ) -> None:
        agentharm_folder()
        for part in suites:
            if part not in FILES:
                raise UserError(f"AgentHarm has no suite {part!r}; there are {', '.join(FILES)}")
        self._limit = max_observation_chars
        chosen = dict.fromkeys(suites or _DEFAULT)
        self._tasks = [_task(behaviour) for part in chosen for behaviour in read_behaviours(folder, part)]

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of the split `heldout`, a pure function of its arguments. UserError for another."""
        if split != "heldout":
            raise UserError("AgentHarm is for evaluation only: it has no tasks to train on")
        return draw({"heldout": self._tasks}, split, count, seed)

    def reset(self, task: Task) -> AgentHarmEpisode:
        """A fresh episode, with tools of its own."""
        return AgentHarmEpisode(behaviour_of(task), self._limit)


def _task(behaviour: Behaviour) -> Task:
    """UserError where the package lacks a tool or the grader of a behaviour."""
    part = behaviour.part
    if part == "harmful" or part == "benign":
        load_tools(part, behaviour.target_functions, "")
        grading_function(part, behaviour.grading_function)
    kind = "benign" if part == "benign" else "harmful"
    return Task(f"{part}/{behaviour.behaviour_id}", kind, "heldout", behaviour)
