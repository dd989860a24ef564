"""Programs that ask the policy: what is trained is what was sampled, whatever they do with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from mosaic_fast.config import Config, EnvConfig
from mosaic_fast.setup.environment import build_environment
from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.environments.custom.rows import Row
from mosaic_rollout.environments.sources import payload_as
from mosaic_rollout.errors import UserError
from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
from mosaic_rollout.types import Completion, Request, Rollout, Task
from tests.rollout.environments.agent_env import programs
from tests.rollout.scripted import ScriptedEngine, call
from tests.rollout.tokenizers_for_tests import WITH_TOOLS, byte_tokenizer

MODULE = "agent:tests.rollout.environments.agent_env.programs"
READ = f"<think>look</think>{call('read')}"
END = "<|im_end|>"


class Slow(ScriptedEngine):
    """Answers after a while, in which its caller may go away; log-probs tell one sample from another."""

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        await asyncio.sleep(0.01)
        return await super().generate(requests)


def says(text: str, key: int) -> str:
    """Reads once, then answers with the word it has read."""
    _, found, rest = text.rpartition("the word is ")
    word = rest.partition("<")[0].strip() if found else ""
    return f"<think>end</think>it says {word}" if word else READ


def tasks_file(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loop_of(
    program: str, folder: Path, rows: list[dict[str, Any]], say: Callable[[str, int], str] = says, **env: Any
) -> AgentLoop:
    values = {"name": f"{MODULE}:{program}", "tasks": tasks_file(folder, rows), **env}
    environment = build_environment(Config(env=EnvConfig.model_validate(values)))
    chat = Chat(byte_tokenizer(WITH_TOOLS), teach_loop=False)
    limits = Limits(max_steps=4, max_step_tokens=200, max_rollout_tokens=3000)
    return AgentLoop(Slow(chat, say), chat, environment, limits)


def play(loop: AgentLoop, count: int = 1, group_size: int = 1) -> list[list[Rollout]]:
    tasks = loop.environment.sample("train", count, 0)
    return asyncio.run(loop.groups(tasks, group_size=group_size, branching="independent", seed=3))


ROWS = [{"prompt": f"what is word number {n}?", "word": f"w{n}"} for n in range(5)]


def columns(rollout: Rollout) -> dict[str, Any]:
    """The columns of its task's row."""
    return payload_as(rollout.task, Row, "programs").columns


def requests_of(loop: AgentLoop) -> list[Request]:
    """What the engine was asked."""
    assert isinstance(loop.engine, Slow)
    return loop.engine.requests


def trained_text(loop: AgentLoop, rollout: Rollout) -> str:
    return loop.chat.decode(rollout.token_ids[rollout.trained])


def test_an_episode_is_one_conversation_of_what_was_sampled(tmp_path: Path):
    loop = loop_of("reads", tmp_path, ROWS)
    [[rollout, other]] = play(loop, group_size=2)
    word = columns(rollout)["word"]
    assert trained_text(loop, rollout) == f"{READ}{END}<think>end</think>it says {word}{END}"
    assert rollout.contexts == ()
    assert (rollout.status, rollout.verdict.done) == ("answered", True)
    assert [step.action for step in rollout.steps] == ["tool_call", "answer"]
    assert rollout.steps[0].observation == f"the word is {word}"
    assert (rollout.rollout_logprobs == np.where(rollout.trained, -1.0, 0.0)).all()
    for step in rollout.steps:
        assert rollout.trained[step.prompt_end : step.end].all()
    last = max(requests_of(loop), key=lambda request: len(request.token_ids))
    assert rollout.token_ids[: len(last.token_ids)].tolist() == last.token_ids.tolist()
    assert other.rollout_id == 1


def test_compacted_and_branched_contexts_have_masks_of_their_own(tmp_path: Path):
    """Each sampled token is trained once, at the place where it was sampled."""
    loop = loop_of("compacts", tmp_path, ROWS, lambda text, key: READ)
    [[rollout]] = play(loop)
    parts = np.split(rollout.token_ids, rollout.contexts)
    assert [loop.chat.decode(part).count("<|im_start|>assistant") for part in parts] == [1, 1, 1]
    assert trained_text(loop, rollout) == 3 * (READ + END)
    loop = loop_of("branches", tmp_path, ROWS, lambda text, key: READ)
    [[rollout]] = play(loop)
    first, second = np.split(rollout.trained, rollout.contexts)
    assert [int(first.sum()), int(second.sum())] == [2 * len(READ) + 2, len(READ) + 1]
    texts = [loop.chat.decode(part) for part in np.split(rollout.token_ids, rollout.contexts)]
    assert texts[0].partition("read 1")[0] == texts[1].partition("read 1")[0]
    spans = [(step.prompt_end, step.end) for step in rollout.steps]
    assert spans == sorted(spans)
    assert sum(end - begin for begin, end in spans) == rollout.trained.sum()


def test_a_hundred_episodes_at_once_keep_apart(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Some read, some die, some hang up and ask again, some never end, and many ask the same."""
    ways = ("reads", "dies", "hangs up", "never ends")
    rows = [
        {"prompt": f"what is word {n % 7}?", "word": f"w{n}", "way": ways[(n // 5) % 4]} for n in range(125)
    ]
    programs.ENDED.clear()
    loop = loop_of("mixed", tmp_path, rows, agent_timeout_s=6.0)
    groups = play(loop, count=100)
    programs.ENDED.set()
    seen = set()
    for [rollout] in groups:
        row, text = columns(rollout), trained_text(loop, rollout)
        seen.add(row["way"])
        if row["way"] in ("reads", "hangs up"):
            assert text == f"{READ}{END}<think>end</think>it says {row['word']}{END}"
            assert (rollout.status, rollout.verdict.done) == ("answered", True)
        elif row["way"] == "dies":
            assert text == READ + END
            assert rollout.verdict.details == {"agent_errors": 1.0}
        else:
            assert text in (READ + END, "")
            assert (rollout.status, rollout.verdict.details) == ("truncated", {"unresolved": 1.0})
    assert seen == set(ways)
    assert sum("Traceback" in line for line in capfd.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("program", "status"), [("asks_for_ever", "truncated"), ("asks_at_once", "answered")]
)
def test_an_episode_has_as_many_answers_as_turns(program: str, status: str, tmp_path: Path):
    """The same asked again, or at once, has other draws each time; then the episode is over."""
    loop = loop_of(program, tmp_path, ROWS)
    [[rollout]] = play(loop)
    assert len(rollout.contexts) == 3
    assert rollout.status == status
    assert len({request.seed for request in requests_of(loop)}) == 4


def test_the_run_samples_as_it_is_configured_and_plain_coroutines_are_awaited(tmp_path: Path):
    loop = loop_of("awaited", tmp_path, ROWS)
    [[rollout]] = play(loop)
    assert rollout.verdict.done
    [request] = requests_of(loop)
    assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("never_asks", "before it asked the policy anything"),
        ("no_score", "must be a finite number, it is 'well done'"),
        ("nothing", "has no class 'nothing'"),
    ],
)
def test_a_program_of_no_use_ends_the_run_in_a_line(tmp_path: Path, program: str, said: str):
    with pytest.raises(UserError, match=said):
        play(loop_of(program, tmp_path, ROWS))


def test_it_is_played_by_a_local_model_and_from_the_prompt_alone(tmp_path: Path):
    loop = loop_of("reads", tmp_path, ROWS)
    with pytest.raises(UserError, match="not with an endpoint"):
        loop.environment.reset(Task("t", "benign", "train"))
    with pytest.raises(ValueError, match=r"needs env\.tasks"):
        EnvConfig(name=f"{MODULE}:reads")
    with pytest.raises(ValueError, match=r"rollout\.branching"):
        Config.model_validate(
            {"env": {"name": "agent:a:b", "tasks": "t"}, "rollout": {"branching": "fork_at_check"}}
        )
