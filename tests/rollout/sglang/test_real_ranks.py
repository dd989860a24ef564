"""Several ranks beside several servers: groups stay on their server, and every server has every update."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest

from mosaic_fast.policy import Policy
from mosaic_rollout.engine.sglang import SGLangEngine
from mosaic_rollout.engine.sglang.weights import Transport, verify_weights
from tests.distributed.launch import run
from tests.rollout.sglang.serving import make_engine, serve

STEPS, TASKS, ROLLOUTS = 3, 4, 4


@pytest.fixture(scope="module")
def second(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    """Another server beside the shared one."""
    engine = make_engine(policy, tmp_path_factory.mktemp("second"))
    serve(engine, engine.health)
    yield engine
    engine.close()


class Relay:
    """Passes everything on to a server and keeps the prompts that it was asked to continue."""

    def __init__(self, onward: str) -> None:
        self.onward = int(onward.rpartition(":")[2])
        self.asked: list[list[int]] = []
        self.url = ""

    async def open(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection("127.0.0.1", self.onward)
        back = asyncio.create_task(_pass_on(there, writer))
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head.lower())
                body = await reader.readexactly(int(length[1]) if length else 0)
                if head.startswith(b"POST /generate"):
                    self.asked.append(json.loads(body)["input_ids"])
                onward.write(head + body)
                await onward.drain()
        except (OSError, asyncio.IncompleteReadError):  # the client has had enough
            onward.close()
        await back


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()


@contextmanager
def relayed(*engines: SGLangEngine) -> Iterator[list[Relay]]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    relays = [Relay(engine.lanes[0].url) for engine in engines]
    for relay in relays:
        asyncio.run_coroutine_threadsafe(relay.open(), loop).result(10)
    yield relays
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.mark.parametrize("transport", [kind for kind in get_args(Transport) if kind != "tensor"])
def test_two_ranks_train_beside_two_servers(
    engine: SGLangEngine, second: SGLangEngine, tmp_path: Path, transport: Transport
):
    folder = tmp_path / "run"
    with relayed(engine, second) as relays:
        code, out, err = run(
            2,
            "mosaic_fast.train",
            *("--engine.kind", "sglang", "--engine.urls", *(relay.url for relay in relays)),
            *(
                "--engine.weights",
                transport,
                "--engine.verify-weights",
                "--engine.deterministic",
                "--run-dir",
                str(folder),
            ),
            *("--steps", str(STEPS), "--checkpoint.every", "1", "--checkpoint.keep", str(STEPS)),
            *("--rollout.prompts-per-step", str(TASKS), "--rollout.group-size", str(ROLLOUTS)),
            *("--env.eval-tasks", "0", "--trackers.console", "plain", "--model.device", "cpu"),
        )
    assert code == 0, out + err
    assert "2 ranks" in out

    # the trainer's log-probs are those of the servers, after updates as before any
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    for row in rows:
        assert abs(row["mismatch/kl"]) < 1e-6
        assert row["mismatch/ratio_max"] < 1.001
        assert row["policy/staleness"] == 0
        # the ideal is one cache's; here each server computes for itself what all tasks share
        assert row["tree/engine_prefix_hit"] >= 0.93 * row["tree/engine_prefix_hit_ideal"]
    assert any(row["optim/grad_norm"] > 0 for row in rows[:-1]), "no update has changed the weights"

    # a group is played by one server, and both play
    served = [{tuple(prompt) for prompt in relay.asked} for relay in relays]
    assert not served[0] & served[1]
    for step in range(1, STEPS + 1):
        path = folder / "trajectories" / f"step-{step:06d}.jsonl"
        rollouts = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rollouts) == TASKS * ROLLOUTS
        by = [where(row["token_ids"], [turn["span"][0] for turn in row["steps"]], served) for row in rollouts]
        assert [{by[i] for i, row in enumerate(rollouts) if row["group_id"] == g} for g in range(TASKS)] == [
            {0}, {1}, {0}, {1},
        ]  # fmt: skip

    # both serve what the last update but one made, which the last step was sampled from
    async def verify(one: SGLangEngine) -> str:
        client = one.lanes[0].client
        checkpoint = folder / "checkpoints" / f"step-{STEPS - 1:06d}"  # which SGLang can load as it is
        await verify_weights(client, checkpoint, STEPS - 1, 60.0)
        version = await client.weight_version(10.0)
        await one.release()
        return version

    assert [asyncio.run(verify(one)) for one in (engine, second)] == [str(STEPS - 1)] * 2


def where(token_ids: list[int], starts: list[int], served: list[set[tuple[int, ...]]]) -> int:
    """The one server that was asked for every turn of a rollout. starts: where turns begin."""
    places = [
        [number for number, prompts in enumerate(served) if tuple(token_ids[:start]) in prompts]
        for start in starts
    ]
    assert places
    assert all(place == places[0] and len(place) == 1 for place in places), places
    return places[0][0]
