"""OpenAI's own client and its agents framework: clients of a served model, and programs in training."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import agents  # pyrefly: ignore [missing-import]
import openai  # pyrefly: ignore [missing-import]
import pytest

from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.run import summary
from mosaic_fast.train import train
from tests.evaluate.serving import evaluate, outcomes
from tests.examples.test_examples import EXAMPLES, command_of
from tests.rollout.environments.agent_env.test_agents import READ, columns, loop_of, play, trained_text

agents.set_tracing_disabled(True)
KEY = "k-123"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {"type": "object", "properties": {of: {"type": "string"} for of in arguments}},
        },
    }
    for name, arguments in (("read_file", ["path"]), ("send_email", ["to", "body"]))
]
REQUEST = [{"role": "user", "content": "please read results.txt and mail it to hugo young."}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The embedded model behind the command, as a user starts it."""
    command = [sys.executable, "-m", "mosaic_fast.serve", "embedded", "--port", "0", "--api-key-env", "KEY"]
    root = Path(__file__).parents[3]
    paths = ":".join(str(root / part) for part in ("", "kernels", "rollout"))
    environment = {"KEY": KEY, "PYTHONPATH": paths, "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[-1]
        finally:
            server.terminate()


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)


def test_openais_client_gets_tools_streams_choices_and_log_probs(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["embedded"]
    asked: dict[str, Any] = {"model": "embedded", "messages": REQUEST, "tools": TOOLS, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True)
    [choice] = whole.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.name == "read_file"
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"path": "results.txt"}'
    seeded = {**asked, "temperature": 1.0, "top_p": 0.9, "seed": 7, "n": 3}
    first, second = (client.chat.completions.create(**seeded) for _ in range(2))
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
    call = choice.message.tool_calls[0]
    output = {"role": "tool", "tool_call_id": call.id, "content": "file text: tiny bread."}
    after = client.chat.completions.create(**{**asked, "messages": [*REQUEST, choice.message, output]})
    assert after.usage.prompt_tokens_details.cached_tokens >= whole.usage.total_tokens - 1
    assert after.choices[0].message.tool_calls[0].function.name == "send_email"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "gpt"}, openai.NotFoundError),
        ({"temperature": 9}, openai.BadRequestError),
        ({"frequency_penalty": 1}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "a " * 3000}]}, openai.BadRequestError),
        ({"tools": [], "messages": REQUEST, "stop": 3}, openai.BadRequestError),
    ],
)
def test_mistakes_are_openais_errors(
    client: openai.OpenAI, change: dict[str, Any], error: type[openai.APIStatusError]
):
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": "embedded", "messages": REQUEST, **change})
    assert raised.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_evaluated_over_the_endpoint_it_is_the_model_itself(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = tmp_path / "world.toml"
    config.write_text("")
    assert evaluate(monkeypatch, "embedded", "--tasks", 18, "--out", tmp_path / "local") == 0
    named = ("--model-name", "embedded", "--tasks", 18, "--config", config, "--teach-loop", False)
    assert evaluate(monkeypatch, url, *named, "--max-rollout-tokens", 512, "--out", tmp_path / "http") == 0
    for here, there in zip(outcomes(tmp_path / "local"), outcomes(tmp_path / "http"), strict=True):
        for one in (here, there):
            one["outcome"].pop("safety_tokens")
        assert there["outcome"] == here["outcome"]


class Memory:
    """What a framework's tools did."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def agent(self, base_url: str, api_key: str, model: str) -> agents.Agent:
        @agents.function_tool
        def read_file(path: str) -> str:
            """Read a file."""
            self.done.append(f"read {path}")
            return "file text: tiny bread."

        @agents.function_tool
        def send_email(to: str, body: str) -> str:
            """Send an email."""
            self.done.append(f"mail {to}")
            return "sent."

        http = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        asked = agents.OpenAIChatCompletionsModel(model=model, openai_client=http)
        settings = agents.ModelSettings(temperature=0)
        return agents.Agent(name="a", model=asked, tools=[read_file, send_email], model_settings=settings)


def test_openais_agents_work_with_the_served_model(url: str):
    memory = Memory()
    result = asyncio.run(agents.Runner.run(memory.agent(url, KEY, "embedded"), REQUEST[0]["content"]))
    assert memory.done == ["read results.txt", "mail hugo young"]
    assert result.final_output


async def framework(task: dict[str, Any], base_url: str, api_key: str) -> float:
    """A program of the framework, as a user writes it for training."""

    @agents.function_tool
    def read() -> str:
        """Read."""
        return f"the word is {task['word']}"

    http = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    asked = agents.OpenAIChatCompletionsModel(model="policy", openai_client=http)
    agent = agents.Agent(name="a", instructions="Be good.", model=asked, tools=[read])
    result = await agents.Runner.run(agent, task["prompt"])
    return float(task["word"] in result.final_output)


def test_what_the_framework_sends_back_is_the_very_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"prompt": f"what is word {n}?", "word": f"w{n}"} for n in range(20)]
    loop = loop_of("reads", tmp_path, rows)
    monkeypatch.setattr(loop.environment, "_function", framework)
    for [rollout] in play(loop, count=16):
        word = columns(rollout)["word"]
        assert rollout.contexts == ()
        assert trained_text(loop, rollout) == f"{READ}<|im_end|><think>end</think>it says {word}<|im_end|>"
        assert rollout.verdict.done


def test_the_example_trains(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(summary, "draw_curves", lambda *_: None)
    monkeypatch.chdir(EXAMPLES.parent)
    text = (EXAMPLES / "my_agent.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    small = ["--steps", "1", "--env.eval-tasks", "0", "--run-dir", str(tmp_path / "run")]
    config, _, _ = parse_train_arguments([*command_of(text), *options, *small])
    assert train(config, "agent") == 0
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["env/agent_errors"] == 0.0
