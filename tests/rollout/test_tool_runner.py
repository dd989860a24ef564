"""Tools with a time limit: what the policy is told, and that nothing waits for ever."""

import asyncio
import threading

import pytest

from mosaic_rollout.loop.tools import ToolRunner
from mosaic_rollout.types import Observation, ToolCall
from tests.rollout.scripted import CountingEpisode


class SlowEpisode(CountingEpisode):
    """`slow` returns once `go` is set; `crash` raises, which an episode must not."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def step(self, call: ToolCall) -> Observation:
        if call.name == "crash":
            raise RuntimeError("a broken environment")
        if call.name == "slow":
            self.go.wait(30)
            return Observation("late")
        return super().step(call)


def test_a_slow_tool_becomes_an_observation_and_the_next_call_waits_its_turn():
    episode = SlowEpisode()
    runner = ToolRunner(episode, 1.0)

    async def play() -> list[Observation]:
        slow = await runner.run(ToolCall("slow", {}))
        busy = await runner.run(ToolCall("read", {}))
        episode.go.set()
        while not (done := await runner.run(ToolCall("read", {}))).content.startswith("read"):
            await asyncio.sleep(0.01)
        return [slow, busy, done]

    slow, busy, done = asyncio.run(asyncio.wait_for(play(), 60.0))
    assert (slow.content, slow.is_error) == ("Error: slow did not finish within 1 seconds", True)
    assert busy.is_error
    assert "earlier call is still running" in busy.content
    assert done == Observation("read 1")  # the refused call was not carried out


def test_tools_of_several_rollouts_run_side_by_side():
    """Each tool returns only once all eight are running."""
    together = threading.Barrier(8, timeout=600)

    class Meeting(CountingEpisode):
        def step(self, call: ToolCall) -> Observation:
            together.wait()
            return Observation("met")

    async def play() -> list[Observation]:
        runners = [ToolRunner(Meeting(), 20.0) for _ in range(8)]
        return list(await asyncio.gather(*(runner.run(ToolCall("meet", {})) for runner in runners)))

    assert asyncio.run(play()) == [Observation("met")] * 8


@pytest.mark.parametrize("timeout_s", [0.0, 5.0])
def test_with_and_without_a_limit_a_quick_tool_gives_the_same(timeout_s: float):
    runner = ToolRunner(SlowEpisode(), timeout_s)
    assert asyncio.run(runner.run(ToolCall("read", {}))) == Observation("read 1")


@pytest.mark.parametrize("timeout_s", [0.0, 5.0])
def test_an_environment_that_raises_is_not_hidden(timeout_s: float):
    runner = ToolRunner(SlowEpisode(), timeout_s)
    with pytest.raises(RuntimeError, match="a broken environment"):
        asyncio.run(runner.run(ToolCall("crash", {})))


def test_without_a_limit_calls_run_in_place():
    episode = SlowEpisode()
    here: list[str] = []
    episode.step = lambda call: here.append(threading.current_thread().name) or Observation("")  # type: ignore[method-assign]
    asyncio.run(ToolRunner(episode, 0.0).run(ToolCall("read", {})))
    assert here == [threading.current_thread().name]
