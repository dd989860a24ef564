"""Endpoints that drop, stall, answer garbage or half an answer, in a whole run: named, and nothing lost."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from mosaic_fast.cli import run_cli
from mosaic_fast.learner.checkpoint import latest_checkpoint
from tests.faults.conftest import run
from tests.faults.servers import Generate, answer, sglang_server
from tests.preferences.endpoint import Json, Raw, endpoint
from tools.soak.campaign import differences


async def drops(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
    """The connection is gone without a word."""


async def stalls(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
    await asyncio.sleep(10)


async def answers_garbage(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\nconnection: close\r\n\r\ndata: {"meta_info": {"output_token\r\n\r\n')


async def answers_another_shape(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
    meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [["x", {}, 3]]}
    whole = b"data: " + json.dumps({"meta_info": meta}).encode() + b"\n\n"
    writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + whole)


async def answers_half(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10000\r\n\r\ndata: {}\n\n")
    await writer.drain()


async def refuses(asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
    writer.write(answer({"error": "no"}, 400))


@pytest.mark.parametrize(
    ("generate", "named"),
    [
        (drops, "cannot be reached"),
        (stalls, "gave no answer within 2 s"),
        (answers_garbage, "no JSON object"),
        (answers_another_shape, "of another shape"),
        (answers_half, "cannot be reached"),
        (refuses, "refused the request"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_engine_that_fails_at_once_ends_the_run_with_one_message_and_leaves_nothing_half_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], generate: Generate, named: str
):
    folder = tmp_path / "run"
    with sglang_server(generate) as url:
        patience_s = "2" if generate is stalls else "60"
        options = ["--engine.kind", "sglang", "--engine.urls", url, "--engine.request-timeout-s", patience_s]
        assert run_cli(lambda: run(folder, *options, "--engine.startup-timeout-s", "60")) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1, said
    assert named in said
    assert url in said
    assert latest_checkpoint(folder / "checkpoints") is None, "nothing was done that it could hold"
    assert (folder / "config.toml").is_file(), "--resume goes on from here"


def prefers_one(request: Json) -> Json:
    """By nothing but the question, so that a run judged by it can be had again."""
    return {"reason": "-", "winner": "1" if len(str(request["messages"])) % 2 else "tie"}


def judged_by(url: str) -> list[str]:
    options = {"name": "llm", "endpoint": url, "model": "m", "retries": "1", "timeout-s": "2.5"}
    return [part for key, value in options.items() for part in (f"--judge.{key}", value)]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose judge never failed. Its address is another one; nothing that is compared has it."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    with endpoint(prefers_one) as served:
        assert run(folder, *judged_by(served.url)) == 0
    return folder


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (Raw(status=503, body="overloaded"), "HTTP 503 overloaded"),
        (Raw(stall_s=5.0, body="{}"), "no answer within judge.timeout_s = 2.5"),
        (Raw(body='{"choices": [{"message": {"content": "\\ud800 '), "not a chat completion"),
        (Raw(body="x" * 50, half=True), "RemoteProtocolError"),
        (Raw(body="not gzip", headers={"content-encoding": "gzip"}), "DecodingError"),
    ],
    ids=["refuses", "stalls", "answers garbage", "answers half", "answers in broken gzip"],
)
def test_a_judge_that_fails_in_the_second_step_costs_nothing_of_the_first(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Raw, named: str
):
    """Once it is sound again the run is resumed, and ends like the one whose judge never failed."""
    folder = tmp_path / "run"
    first, broken = folder / "checkpoints" / "step-000001", True

    def judge(request: Json) -> Raw | Json:
        return fault if broken and first.exists() else prefers_one(request)

    with endpoint(judge) as served:
        assert run_cli(lambda: run(folder, *judged_by(served.url))) == 2
        said = capsys.readouterr().err
        assert said.count("error: ") == 1, said
        assert named in said
        assert "--resume" in said
        kept = contents(first)
        broken = False
        assert run(folder, "--resume") == 0
        assert kept == contents(first)
    assert differences(folder, judged) == []
