"""A real server killed, stopped or cut off at work: nothing hangs, nothing finished is lost."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mosaic_fast.policy import Policy
from mosaic_rollout.engine import EngineError
from mosaic_rollout.engine.sglang import SGLangEngine
from mosaic_rollout.environments.world import WorldEnvironment
from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
from mosaic_rollout.types import Completion, Rollout
from tests.rollout.sglang.serving import (
    PATIENCE_S,
    embedded_chat,
    make_engine,
    prompt,
    request,
    script,
    serve,
)

END = 2  # the embedded model's end of a turn


@pytest.fixture
def steady(engine: SGLangEngine) -> Iterator[SGLangEngine]:
    """The shared server, its statistics at zero, quick to be found hung."""
    [lane] = engine.lanes
    usual = lane.options
    engine.stats.reset()
    lane.options = replace(usual, hang_timeout_s=6.0)
    yield engine
    lane.options = usual


def play(engine: SGLangEngine, trouble: signal.Signals | None, after: int = 40) -> list[Rollout]:
    """Eight groups of four in the world; after so many completions the server is sent the signal."""
    chat = embedded_chat()
    loop = AgentLoop(engine, chat, WorldEnvironment(), Limits(6, 72, 512))
    tasks = WorldEnvironment().sample("train", 8, 3)

    async def disturb() -> None:
        while trouble is not None and engine.stats.completions < after:
            await asyncio.sleep(0.005)
        if trouble is not None:
            process = engine.lanes[0].process
            assert process is not None
            assert process.pid is not None
            os.killpg(process.pid, trouble)

    async def played() -> list[Rollout]:
        disturbance = asyncio.create_task(disturb())
        groups = await asyncio.wait_for(
            loop.groups(tasks, group_size=4, branching="independent", seed=9), timeout=PATIENCE_S
        )
        await disturbance
        return [rollout for group in groups for rollout in group]

    return serve(engine, played)


@pytest.mark.parametrize("trouble", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hung_server_costs_no_trajectory(steady: SGLangEngine, trouble: signal.Signals):
    """Finished turns stay, unfinished ones are sampled again: the rollouts are those of a quiet run.

    Draws are keyed, so a rollout can differ only where rounding, which depends on the batch, tips a draw.
    """
    quiet = play(steady, None)
    asked = steady.stats.completions
    steady.stats.reset()
    disturbed = play(steady, trouble)
    assert steady.stats.restarts == 1
    assert steady.stats.resent >= 1
    assert abs(steady.stats.completions - asked) <= 0.1 * asked  # nothing finished was asked for again
    same = [
        left.token_ids.tolist() == right.token_ids.tolist()
        for left, right in zip(quiet, disturbed, strict=True)
    ]
    assert sum(same) >= 0.9 * len(same)


def test_a_lost_request_is_sent_again_to_a_server_that_lives(steady: SGLangEngine):
    """The server drops all it has: nobody restarts it for that."""

    async def drop() -> None:
        while steady.stats.completions < 5:
            await asyncio.sleep(0.005)
        await steady.lanes[0].client.call("/abort_request", {"abort_all": True}, timeout_s=10.0)

    async def played() -> list[Completion]:
        dropping = asyncio.create_task(drop())
        asked = [request(prompt(40, key), 10 + 20 * key, key=key) for key in range(12)]
        done = await asyncio.wait_for(steady.generate(asked), timeout=PATIENCE_S)
        await dropping
        return done

    done = serve(steady, played)
    for key, completion in enumerate(done):  # none is what was left when the server dropped it
        assert len(completion.token_ids) == 10 + 20 * key or completion.token_ids[-1] == END
    assert steady.stats.resent >= 1
    assert steady.stats.restarts == 0


@pytest.mark.parametrize("trouble", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_fails_in_an_update_over_a_group_is_brought_to_it(
    steady: SGLangEngine, trouble: signal.Signals
):
    """The group breaks with the server; the server that takes its place joins a new one."""
    usual, steady.options = steady.options, replace(steady.options, transport="distributed")
    load_s, steady._load_s = steady._load_s, 6.0
    [lane] = steady.lanes
    assert lane.process is not None

    async def served() -> tuple[str, str | None]:
        group = steady._groups.get(lane)
        return await lane.client.weight_version(10.0), group.name if group else None

    try:
        version, name = serve(steady, served, version=2)
        assert version == "2"
        assert name is not None
        assert lane.process.pid is not None
        os.killpg(lane.process.pid, trouble)
        version, new_name = serve(steady, served, version=3)
        assert (version, steady.stats.restarts) == ("3", 1)
        assert new_name not in (None, name)
        assert serve(steady, served, version=4) == ("4", new_name)
    finally:
        steady.options, steady._load_s = usual, load_s
        steady._leave_group(lane)


def test_a_server_started_again_beside_training_gets_the_weights_it_had(steady: SGLangEngine, policy: Policy):
    """With rollouts ahead of the trainer, its weights are other ones by the time a server dies."""
    usual = steady.options
    steady.options = replace(usual, transport="distributed", changing=True)
    [lane] = steady.lanes
    asked = request(prompt(50, 8), 16, key=3)

    async def interrupted() -> tuple[Completion, Completion]:
        [before] = await steady.generate([asked])
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.07)
        assert lane.process is not None
        assert lane.process.pid is not None
        os.killpg(lane.process.pid, signal.SIGKILL)
        [after] = await steady.generate([asked])
        return before, after

    kept = copy.deepcopy(policy.model.state_dict())
    try:
        before, after = serve(steady, interrupted, version=5)
    finally:
        policy.model.load_state_dict(kept)
        steady.options = usual
        steady._leave_group(lane)
    assert steady.stats.restarts == 1
    np.testing.assert_allclose(after.logprobs, before.logprobs, rtol=2e-6, atol=2e-5)
    assert after.policy_version == 5


def test_an_update_lost_on_the_way_to_a_server_that_lives_is_sent_again(steady: SGLangEngine):
    """Nobody restarts the server, nor takes it for updated."""
    process = steady.lanes[0].process
    assert process is not None
    url, lost = process.url, []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asks: bool) -> None:
        while data := await reader.read(65_536):
            if asks and not lost and data.startswith(b"POST /update_weights_from_disk"):
                lost.append(data)
                break
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        await asyncio.gather(forward(reader, onward[1], asks=True), forward(onward[0], writer, asks=False))

    async def updated() -> str:
        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        process.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            await steady.update_weights(9)
            return await steady.lanes[0].client.weight_version(10.0)
        finally:
            await steady.release()
            server.close()
            process.url = url

    assert asyncio.run(updated()) == "9"
    assert lost
    assert steady.stats.restarts == 0


def test_a_server_that_cannot_start_shows_the_end_of_its_log(policy: Policy, tmp_path: Path):
    engine = make_engine(policy, tmp_path, python=script(tmp_path, "echo no such library; exit 3"))
    with pytest.raises(
        EngineError, match=r"(?s)exited with 3 while starting.*server-0\.log.*no such library"
    ):
        serve(engine, engine.health)
