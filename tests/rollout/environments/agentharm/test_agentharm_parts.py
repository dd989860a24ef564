"""What of AgentHarm needs no package: its files' form, the namespace its code runs in, a missing package."""

import asyncio
import json
import random
from pathlib import Path

import pytest

from mosaic_fast.preferences.endpoint import Endpoint
from mosaic_rollout.environments.agentharm import Behaviour, Grades, grade, grading
from mosaic_rollout.environments.agentharm.environment import read_behaviours
from mosaic_rollout.environments.agentharm.package import SourceFolder
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Step
from tests.preferences.endpoint import Raw, completion, endpoint

GOOD = {
    "id": "1-1",
    "category": "Invented",
    "prompt": "An invented request.",
    "target_functions": ["send_email"],
    "grading_function": "grade_it",
}


def written(folder: Path, content: object) -> Path:
    (folder / "benchmark").mkdir()
    (folder / "benchmark" / "harmful_behaviors_test_public.json").write_text(json.dumps(content))
    return folder


def test_behaviours_are_read_from_the_data_set_or_its_folder(tmp_path: Path):
    folder = written(tmp_path, {"behaviors": [GOOD]})
    (found,) = read_behaviours(folder, "harmful")
    assert read_behaviours(folder / "benchmark", "harmful") == [found]
    assert (found.behaviour_id, found.target_functions) == ("1-1", ("send_email",))
    assert found.metadata == {"target_functions": ["send_email"], "category": "Invented"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([GOOD], 'has no list "behaviors"'),
        ({"behaviors": ["x"]}, "behaviour 0: not an object"),
        ({"behaviors": [{**GOOD, "prompt": ""}]}, 'behaviour 1-1: there is no "prompt"'),
        (
            {"behaviors": [{**GOOD, "target_functions": "f"}]},
            'behaviour 1-1: "target_functions" must be a list',
        ),
        (
            {"behaviors": [{**GOOD, "grading_function": None}]},
            'behaviour 1-1: there is no "grading_function"',
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(content: object, named: str, tmp_path: Path):
    with pytest.raises(UserError, match=named):
        read_behaviours(written(tmp_path, content), "harmful")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"holds no chat_public_test.json; name a copy of the data set AgentHarm"
    ):
        read_behaviours(tmp_path, "chat")


TOOL = """
import os, random
from inspect_ai.tool import Tool, tool
from inspect_evals.agentharm.content import TEXT
seen = []

@tool
def look() -> Tool:
    async def run(path: str) -> str:
        seen.append(path)
        there = os.path.exists(path)
        return f"{len(seen)} {there} {open(path).read() if there else TEXT} {random.random()}"
    return run
"""


def run(source: SourceFolder, path: str) -> str:
    with pytest.raises(StopIteration) as ended:
        source.execute("look").look()(path).send(None)
    return ended.value.value


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "agentharm"
    folder.mkdir()
    (folder / "look.py").write_text(TOOL)
    (folder / "content.py").write_text("TEXT = 'nothing'")
    (folder / "note.txt").write_text("a note")
    (tmp_path / "secret.txt").write_text("of the machine")
    return folder


def test_each_episode_has_the_files_variables_to_itself(files: Path):
    """A list that a tool appends to, and its random draws."""
    first, second = (SourceFolder(files, random.Random("a")) for _ in range(2))
    told = run(first, "note.txt")
    assert told.startswith("1 True a note ")
    assert run(first, "note.txt").startswith("2 ")
    assert run(second, "note.txt") == told
    assert run(SourceFolder(files, random.Random("b")), "note.txt") != told


@pytest.mark.parametrize("path", ["../secret.txt", "/etc/hostname", "{}/secret.txt", ".."])
def test_a_tool_reads_nothing_of_the_machine(path: str, files: Path):
    assert run(SourceFolder(files, random.Random(0)), path.format(files.parent)).startswith("1 False nothing")


@pytest.mark.parametrize(
    "line", ["import subprocess", "from os import system", "import socket", "open('x', 'w')"]
)
def test_a_tool_reaches_for_nothing_else(line: str, files: Path):
    (files / "bad.py").write_text(line)
    with pytest.raises((ImportError, FileNotFoundError)):
        SourceFolder(files, random.Random(0)).execute("bad")
    assert not (files / "x").exists()


@pytest.mark.parametrize(
    "mixed", ["Answer: yes, on reflection Answer: no", "Answer: **no**\nStill, some would say\nAnswer: yes"]
)
@pytest.mark.parametrize(
    ("answer", "refused"), [("Answer: no", False), ("It declines.\nAnswer: *Yes*", True)]
)
def test_a_refusal_judge_that_says_yes_and_no_is_asked_again(
    mixed: str, answer: str, refused: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grading, "refusal_prompt", lambda: "Did this refuse? {generation}")
    behaviour = Behaviour("chat", "1", "Invented", "An invented request.")
    step = Step(0, 1, "No.", None, None, "answer", None, "No.", None, 0, False)
    answers = iter([mixed, answer])

    async def judged(url: str) -> Grades:
        server = Endpoint(
            url=url, model="m", api_key=None, api_key_env="KEY", max_tokens=64, backoff_s=0.0, retries=1
        )

        async with server.open() as http:

            async def ask(prompt: str, shape: str) -> str:
                messages = [{"role": "user", "content": prompt}]
                return (await server.ask_text(http, messages, shape, lambda: None)).answer

            return await grade(behaviour, [step], "answered", ask)

    with endpoint(lambda _: Raw(body=completion(next(answers)))) as served:
        grades = asyncio.run(judged(served.url))
    assert len(served.requests) == 2
    assert (grades.refused, grades.score) == (refused, None)
