"""What a tool of a user does, a rollout survives; what reset or a verdict raises ends the run in one line."""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import Awaitable, Callable, Generator
from functools import partial, partialmethod
from pathlib import Path

import pytest

from mosaic_rollout.environments.custom import CustomEnvironment
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign.code import place, words
from mosaic_rollout.types import ToolCall
from tests.rollout.environments.custom_env.guests import Quiet, calls, environment_of, episode_of


class Untold(Exception):
    def __str__(self) -> str:
        raise SystemExit("not to be told")


class OutOfTheBlue(BaseException):
    pass


def _throw(error: BaseException) -> None:
    raise error


def _exits() -> None:
    argparse.ArgumentParser().parse_args(["--nonsense"])


def _endless() -> None:
    _endless()


RAISED: dict[str, Callable[[], None]] = {
    name: partial(_throw, error)
    for name, error in {
        "ValueError": ValueError("only 100\neuros"),
        "SystemExit": SystemExit(3),
        "GeneratorExit": GeneratorExit(),
        "CancelledError": asyncio.CancelledError(),
        "StopIteration": StopIteration(1),
        "MemoryError": MemoryError(),
        "OutOfTheBlue": OutOfTheBlue("x" * 10_000),
        "Untold": Untold(),
        "ExceptionGroup": ExceptionGroup("two", [ValueError("a"), KeyError("b")]),
    }.items()
} | {"argparse": _exits, "RecursionError": _endless}


@pytest.mark.parametrize("timeout_s", [0.0, 20.0])
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("kind", RAISED)
def test_what_a_tool_raises_is_an_error_observation(
    tmp_path: Path, kind: str, is_async: bool, timeout_s: float
):
    class Office(Quiet):
        def plain(self) -> str:
            """Fail."""
            RAISED[kind]()
            return "not reached"

        async def later(self) -> str:
            """Fail."""
            RAISED[kind]()
            return "not reached"

        def fine(self) -> str:
            """Work."""
            return "fine"

    episode = episode_of(tmp_path, Office)
    failing = ToolCall("later" if is_async else "plain", {})
    failed, fine = asyncio.run(calls(episode, timeout_s, failing, ToolCall("fine", {})))
    assert failed.is_error
    assert re.fullmatch(r"Error: .*\(test_foreign_code\.py, line \d+\)", failed.content)
    assert "\n" not in failed.content
    assert len(failed.content) < 1000
    assert (fine.content, fine.is_error) == ("fine", False)
    assert episode.score("done").done


@pytest.mark.parametrize("timeout_s", [0.0, 20.0])
def test_ctrl_c_is_no_observation(tmp_path: Path, timeout_s: float):
    class Office(Quiet):
        def stop(self) -> str:
            """Stop."""
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(calls(episode_of(tmp_path, Office), timeout_s, ToolCall("stop", {})))


def test_the_line_is_the_users_own_not_the_librarys():
    with pytest.raises(SystemExit) as raised:
        _exits()  # deep in argparse
    found = place(raised.value)
    assert found is not None
    assert found[0] == __file__
    assert words(raised.value) == "SystemExit: 2"


def test_the_first_traceback_is_shown_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Office(Quiet):
        def fail(self) -> str:
            """Fail."""
            raise ValueError("the disk is full")

    episode = episode_of(tmp_path, Office)
    for _ in range(3):
        assert episode.step(ToolCall("fail", {})).is_error
    shown = capsys.readouterr().err
    assert shown.count("Traceback") == 1
    assert "env/tool_errors" in shown


class Client:
    """Something that lives in the event loop it was first used in, as clients of servers do."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None

    async def ask(self) -> str:
        loop = asyncio.get_running_loop()
        assert self.loop in (None, loop), "used in two event loops"
        self.loop = loop
        await asyncio.sleep(0)
        return "answered"


SHARED = Client()


class Answering:
    def __await__(self) -> Generator[None, None, str]:
        yield from asyncio.sleep(0).__await__()
        return "answered"


class Asking(Quiet):
    """Every way to be async, or to start a loop of one's own."""

    async def reset(self, **row: object) -> str:  # type: ignore[override]
        self.client = Client()
        await self.client.ask()
        return "opened"

    async def direct(self) -> str:
        """Ask."""
        return await self.client.ask()

    def handed_on(self) -> Awaitable[str]:
        """Ask."""
        return self.client.ask()

    async def shared(self) -> str:
        """Ask."""
        return await SHARED.ask()

    def awaitable(self) -> str:
        """Ask."""
        return Answering()  # type: ignore[return-value]

    def own_loop(self) -> str:
        """Ask."""
        return asyncio.run(Client().ask())

    def older_own_loop(self) -> str:
        """Ask."""
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(Client().ask())
        finally:
            loop.close()

    @staticmethod
    async def static() -> str:
        """Ask."""
        return await Client().ask()

    @classmethod
    async def of_class(cls) -> str:
        """Ask."""
        return await Client().ask()

    async def get_verdict(self) -> dict[str, object]:  # type: ignore[override]
        return {"harm": False, "done": await self.client.ask() == "answered"}


@pytest.mark.parametrize("timeout_s", [0.0, 20.0])
def test_what_is_async_is_awaited(tmp_path: Path, timeout_s: float):
    environment = environment_of(tmp_path, Asking)
    (task,) = environment.sample("train", 1, 0)

    async def play() -> None:
        for _ in range(2):  # a second rollout finds the same loop
            episode = environment.reset(task)
            assert str(episode.messages[-1]["content"]).endswith("opened")
            names = [str(tool["function"]["name"]) for tool in episode.tools]  # type: ignore[index]
            assert len(names) == 8
            for observation in await calls(episode, timeout_s, *(ToolCall(name, {}) for name in names)):
                assert (observation.content, observation.is_error) == ("answered", False)
            assert episode.score("done").done
        assert asyncio.current_task() is not None, "our own loop is as it was"
        await asyncio.sleep(0)

    asyncio.run(play())


def _cyclic() -> type:
    class Broken(Quiet):
        def __getattr__(self, name: str) -> object:
            return vars(self)["values"][name]

    return Broken


def test_looking_something_up_may_raise(tmp_path: Path):
    """A __getattr__ that raises KeyError, which getattr lets through, where a method is missing."""

    class Reward(_cyclic()):  # type: ignore[misc]
        get_verdict = property(lambda self: 1 / 0)  # type: ignore[assignment]

    with pytest.raises(UserError, match=r"get_verdict cannot be read: ZeroDivisionError.*test_foreign_code"):
        environment_of(tmp_path, Reward)


class NeedsRow:
    def reset(self, balance: int) -> None: ...
    def get_reward(self) -> float:
        return 1.0


@pytest.mark.parametrize("method", ["__init__", "reset", "get_verdict"])
@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(0), asyncio.CancelledError()])
def test_what_the_run_needs_ends_it_in_one_line(tmp_path: Path, method: str, error: BaseException):
    def fail(self: object, **row: object) -> None:
        raise error

    fine = {"reset": lambda self, **row: None, "get_verdict": lambda self: {"harm": False, "done": False}}
    kind = type("Office", (), fine | {method: fail})
    with pytest.raises(UserError) as raised:
        episode_of(tmp_path, kind).score(None)
    assert re.search(rf"Office.*{type(error).__name__}.*test_foreign_code\.py, line \d+\)", str(raised.value))
    assert "\n" not in str(raised.value)


def test_a_row_that_does_not_fit_names_the_method(tmp_path: Path):
    with pytest.raises(UserError, match=r"NeedsRow\.reset failed: TypeError: .*balance.*test_foreign_code"):
        episode_of(tmp_path, NeedsRow)


def _yields(self: object) -> Generator[str, None, None]:
    """Yield."""
    yield "part"


async def _yields_later(self: object):
    """Yield."""
    yield "part"


def _any(self: object, *args: int) -> str:
    """Take.

    Args:
        args: Any.
    """
    return ""


def _any_named(self: object, **more: int) -> str:
    """Take.

    Args:
        more: Any.
    """
    return ""


def _by_position(self: object, n: int, /) -> str:
    """Take.

    Args:
        n: One.
    """
    return ""


def _refuses(self: object) -> str:
    """Refuse."""
    return ""


@pytest.mark.parametrize(
    ("name", "tool", "said"),
    [
        ("read", _yields, "Office.read is a generator"),
        ("read", _yields_later, "Office.read is a generator"),
        ("read", _any, r"any number of arguments \(\*args\)"),
        ("read", _any_named, r"any number of arguments \(\*\*more\)"),
        ("read", _by_position, r"by its position only \(n\)"),
        ("read", partialmethod(_refuses), "Office.read is public and so a tool, but"),
        ("refusal_tool", _refuses, "the tool with which the policy refuses"),
        ("reset", _yields, "Office.reset is a generator"),
        ("get_verdict", _yields_later, "Office.get_verdict is a generator"),
    ],
)
def test_a_method_that_can_be_no_tool_is_refused(
    tmp_path: Path, name: str, tool: Callable[..., object], said: str
):
    with pytest.raises(UserError, match=said):
        environment_of(tmp_path, type("Office", (Quiet,), {name: tool}))


def test_a_generator_handed_on_is_an_error_observation(tmp_path: Path):
    class Office(Quiet):
        def read(self) -> str:
            """Read."""
            return (part for part in "ab")  # type: ignore[return-value]

    seen = episode_of(tmp_path, Office).step(ToolCall("read", {}))
    assert seen.is_error
    assert "gave a generator" in seen.content


def test_one_instance_for_all_rollouts_is_refused(tmp_path: Path):
    only = Quiet()
    environment = environment_of(tmp_path, lambda: only)
    with pytest.raises(UserError, match="an instance that it has given before"):
        environment.reset(environment.sample("train", 1, 0)[0])


def test_a_whole_lot_of_rows_is_divided_at_once(tmp_path: Path):
    environment = environment_of(tmp_path, Quiet, [{"prompt": f"do {i}"} for i in range(4000)])
    assert isinstance(environment, CustomEnvironment)
    assert len({task.task_id for task in environment.sample("heldout", 800, 0)}) == 800
