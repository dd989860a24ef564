"""What a model writes, and files of tasks: through the whole loop, to disk and back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random

import numpy as np
from transformers import PreTrainedTokenizerFast

from mosaic_fast.preferences import RuleJudge
from mosaic_fast.preferences.reward import group_reward
from mosaic_fast.report.read import Notes, read_groups
from mosaic_fast.run.trajectories import write_trajectories
from mosaic_fast.setup.model_folder import model_folder
from mosaic_rollout.chat.call_formats import FORMATS, HERMES
from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.grammar import TAGS, Turn, parse_turn
from mosaic_rollout.environments.agent_safetybench import INSTALL_HINT, read_cases
from mosaic_rollout.environments.custom.rows import read_rows
from mosaic_rollout.environments.sources import EnvironmentMissing
from mosaic_rollout.environments.world import WorldEnvironment
from mosaic_rollout.errors import UserError
from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
from mosaic_rollout.types import Rollout, ToolCall
from tests.fuzz import hostile
from tests.fuzz.subject import Subject, Try
from tests.rollout.calls_for_tests import can_be_written, drawn_call, schema_of
from tests.rollout.scripted import ScriptedEngine
from tests.rollout.tokenizers_for_tests import PLAIN, byte_tokenizer

LIMITS = Limits(max_steps=3, max_step_tokens=400, max_rollout_tokens=6000)


def _turn(random: Random) -> tuple[str, str | None]:
    """A turn, and the status in which it ends a rollout; "" where it goes on, None where nobody knows."""
    plan, check = _harmless(random), _harmless(random)
    opening = f"<think>{plan}</think>" + (
        f"<safety_thoughts>{check}</safety_thoughts>" if random.random() < 0.4 else ""
    )
    how = random.randrange(7)
    if how == 0:
        return opening + "All " + _harmless(random), "answered"
    if how == 1:
        arguments = hostile.written({"reason": _harmless(random)})
        return (
            f'{opening}<tool_call>{{"name": "refusal_tool", "arguments": {arguments}}}</tool_call>',
            "refused",
        )
    if how == 2:
        arguments = hostile.written({"path": _harmless(random)})
        return f'{opening}<tool_call>{{"name": "read_file", "arguments": {arguments}}}</tool_call>', ""
    if how == 3:
        broken = random.choice(
            ('{"name": 3}', "[]", "{", '{"name": "x", "arguments": [1]}', "NaN", "[" * 300)
        )
        return f"{opening}<tool_call>{broken}</tool_call>", "malformed"
    if how == 4:
        written = HERMES.write(drawn_call(random))  # texts in its arguments try to pass for something else
        return opening + written, "refused" if '"name": "refusal_tool"' in written[:40] else ""
    if how == 5:
        call = {"name": hostile.text(random, longest=3), "arguments": hostile.value(random)}
        return f"{opening}<tool_call>{hostile.written(hostile.changed(random, call))}</tool_call>", None
    return hostile.text(random), None


def _harmless(random: Random) -> str:
    """Strange text without tags, and without what a template would take for one."""
    words = (
        "\x00",
        "é",
        "漢字",
        "😀",
        "\u202e",
        "\x1b[0m",
        "a",
        " ",
        "\n",
        '"',
        "\\",
        "{",
        "}",
        "'",
        "\ufeff",
    )
    return "x" + "".join(random.choice(words) for _ in range(random.randrange(12)))


@contextlib.contextmanager
def _parsed(folder: Path) -> Iterator[Try]:
    def attempt(random: Random) -> str:
        text = hostile.text(random, longest=60, megabytes=True)
        if random.random() < 0.3:
            text = _turn(random)[0]
        call = drawn_call(random)
        form = random.choice(FORMATS)
        if random.random() < 0.3 and can_be_written(call, form):
            text = f"<think>a</think>{form.write(call)}"
            _check_same(parse_turn(text, form, tools=[schema_of(call)]), call)
        if random.random() < 0.3:
            text = hostile.damaged(random, text.encode()).decode(errors="replace")
        found = [parse_turn(text, form, think_is_open=random.random() < 0.2) for form in FORMATS]
        for turn in found:
            _check(turn)
        return found[0].action

    yield attempt


def _check_same(turn: Turn, call: ToolCall) -> None:
    assert turn.well_formed
    assert turn.call is not None
    assert (turn.call.name, turn.plan, turn.check) == (call.name, "a", None)
    assert json.dumps(turn.call.arguments) == json.dumps(call.arguments)


def _check(turn: Turn) -> None:
    assert (turn.call is not None) == (turn.action in ("tool_call", "refusal"))
    assert (turn.answer is not None) == (turn.action == "answer")
    if turn.call is not None:
        assert (turn.call.name == "refusal_tool") == (turn.action == "refusal")
        json.dumps(turn.call.arguments, allow_nan=False).encode()
    if turn.answer is not None:
        assert turn.answer.strip()
        assert not (turn.well_formed and any(tag in turn.answer for tag in TAGS))


@contextlib.contextmanager
def _rollouts(folder: Path) -> Iterator[Try]:
    """Two rollouts of a task: their statuses, and every one of them on disk and back."""
    chat = Chat(byte_tokenizer(PLAIN), teach_loop=False)
    environment, path = WorldEnvironment(), folder / "step-000001.jsonl"

    def attempt(random: Random) -> str:
        turns = [[_turn(random) for _ in range(LIMITS.max_steps)] for _ in range(2)]
        spoken = [0, 0]

        def say(text: str, rollout: int) -> str:
            spoken[rollout] += 1
            return turns[rollout][spoken[rollout] - 1][0]

        loop = AgentLoop(ScriptedEngine(chat, say), chat, environment, LIMITS)
        tasks = environment.sample("train", 1, random.randrange(1000))
        play = loop.groups(tasks, group_size=2, branching="independent", seed=0)
        (group,) = asyncio.run(play)
        for rollout, said in zip(group, turns, strict=True):
            _check_status(rollout, said)
        judgements, rewards = RuleJudge().judge([group]), [group_reward(group, np.full((2, 2), 0.5), 40.0)]
        write_trajectories(path, [group], judgements, rewards, [np.zeros(2)])
        notes = Notes()
        (back,) = list(read_groups(path, notes))
        assert not notes.texts
        assert [row.status for row in back] == [rollout.status for rollout in group]
        assert [row.token_ids for row in back] == [rollout.token_ids.tolist() for rollout in group]
        for line in path.read_text(encoding="utf-8").splitlines():
            json.loads(line, parse_constant=_no_json)
        return group[0].status

    yield attempt


def _check_status(rollout: Rollout, said: list[tuple[str, str | None]]) -> None:
    """By what was said, up to the first turn of which nobody knows what it is."""
    for number, (text, ending) in enumerate(said):
        if ending is None or len(text.encode()) >= LIMITS.max_step_tokens:
            return
        if ending:
            assert (rollout.status, len(rollout.steps)) == (ending, number + 1), (
                rollout.status,
                ending,
                text,
            )
            return
    assert rollout.status == "truncated"


def _no_json(constant: str) -> object:
    raise AssertionError(f"{constant} in a trajectory is no JSON")


@contextlib.contextmanager
def _tasks(folder: Path) -> Iterator[Try]:
    chat = Chat(PreTrainedTokenizerFast.from_pretrained(model_folder("embedded")), teach_loop=False)
    path = folder / "tasks.jsonl"
    plain = Chat(byte_tokenizer(PLAIN), teach_loop=False)  # a template without tools: calls are written out
    call = {"name": "f", "arguments": '{"x": 1}'}
    row = {
        "prompt": [
            {"role": "system", "content": "s"},
            {"role": "assistant", "content": "c", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "o"},
            {"role": "user", "content": "u"},
        ],
        "kind": "benign",
        "x": 1,
    }
    case = {"id": 1, "instruction": "i", "environments": [{"name": ""}], "fulfillable": 1, "dialog": []}

    def attempt(random: Random) -> str:
        rows = [row | {"prompt": hostile.text(random, megabytes=True)}, row]
        if random.random() < 0.7:
            rows.append(hostile.changed(random, row))  # pyrefly: ignore [bad-argument-type]
        content = "\n".join(map(hostile.written, rows)).encode("utf-8", "surrogatepass")
        if random.random() < 0.3:
            content = hostile.written([case, hostile.changed(random, case)]).encode()
        path.write_bytes(hostile.damaged(random, content) if random.random() < 0.3 else content)
        outcomes = []
        for read in (read_rows, read_cases):
            try:
                found = read(path)
            except EnvironmentMissing as error:  # a case names an environment; there is no package of them
                assert read is read_cases
                assert not _has_worlds()
                assert INSTALL_HINT in str(error)
                outcomes.append("refused")
            except UserError as error:
                assert str(path) in str(error)
                outcomes.append("refused")
            else:
                outcomes.append("accepted")
                for task in found[:2]:
                    if sum(len(str(message["content"])) for message in task.messages) < 10_000:
                        for one in (chat, plain):
                            with contextlib.suppress(UserError):  # a template may refuse an order of roles
                                one.prompt(task.messages, ())
        return "accepted" if "accepted" in outcomes else "refused"

    yield attempt


def _has_worlds() -> bool:
    return find_spec("asb_envs") is not None


PARSED = Subject("model outputs, parsed", 0.15, _parsed)
ROLLOUTS = Subject("model outputs, played", 0.1, _rollouts)
TASKS = Subject("task files", 0.05, _tasks)
