"""What users' and packages' code gives and takes: verdicts, the arguments of tools, what tools do."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random

import numpy as np
import torch

from mosaic_fast.errors import UserError
from mosaic_rollout.environments.custom import CustomEnvironment
from mosaic_rollout.environments.world import WorldEnvironment
from mosaic_rollout.environments.world.environment import TOOL_ARGUMENTS
from mosaic_rollout.foreign.checks import wrong_arguments
from mosaic_rollout.types import JsonValue, ToolCall, Verdict
from tests.fuzz import hostile
from tests.fuzz.subject import Subject, Try

_KINDS: tuple[Callable[[float], object], ...] = (
    *(float, np.float32, np.float64, np.array, torch.tensor, lambda x: torch.tensor(x, requires_grad=True)),
    *(lambda x: x > 0, lambda x: np.bool_(x > 0), lambda x: torch.tensor(x > 0), lambda x: [x], str),
    *(lambda x: np.full(1, x), lambda x: complex(x, 1), lambda x: Fraction(10**400), lambda x: Decimal(x)),
)
_NUMBERS = (0.0, 1.0, 0.5, -1.0, 7.0, math.nan, math.inf, 1e308, -0.0)


def _number(random: Random) -> object:
    """A number of some library, or something else; most often a fine one."""
    if random.random() < 0.4:
        return random.choice((True, False, 0, 1, 0.5))
    if random.random() < 0.2:
        return hostile.value(random)
    return random.choice(_KINDS)(random.choice(_NUMBERS))


class _Guest:
    """A user's class whose verdict and whose tool are drawn: it raises, awaits, changes what it gets."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def reset(self, **row: object) -> None:
        row.clear()

    def act(self, items: list[str], n: int = 0) -> str:
        """Do something.

        Args:
            items: Texts.
            n: A number.
        """
        assert all(isinstance(item, str) for item in items), "the schema says texts"
        items.clear()
        how = self._random.randrange(7)
        if how < 4:
            errors = (
                ValueError(hostile.text(self._random)),
                SystemExit(),
                asyncio.CancelledError(),
                KeyError(),
            )
            raise errors[how]
        if how == 4:
            return asyncio.run(_later(hostile.text(self._random)))
        return _later(hostile.text(self._random)) if how == 5 else hostile.value(self._random)  # type: ignore[return-value]

    def get_verdict(self) -> object:
        names = ("harm", "done", "progress", "seconds", hostile.text(self._random, longest=3))
        kept = names if self._random.random() < 0.9 else names[1:]
        return {name: _number(self._random) for name in kept}


async def _later(text: str) -> str:
    await asyncio.sleep(0)
    return text


@contextlib.contextmanager
def _verdicts(folder: Path) -> Iterator[Try]:
    tasks = folder / "tasks.jsonl"
    tasks.write_text('{"prompt": "a", "x": [1]}\n{"prompt": "b", "x": [1]}\n')

    def attempt(random: Random) -> str:
        environment = CustomEnvironment(lambda: _Guest(random), tasks, max_observation_chars=500)
        (task,) = environment.sample("train", 1, 0)
        episode = environment.reset(task)
        arguments: dict[str, JsonValue] = {"items": ["a", hostile.text(random)]}
        if random.random() < 0.5:
            arguments = {"items": hostile.value(random), "n": hostile.value(random)}  # type: ignore[dict-item]
        call = ToolCall("act", arguments)
        before = _written(call)
        with contextlib.redirect_stderr(io.StringIO()):  # the first traceback is shown
            seen = episode.step(call)
        assert _written(call) == before, "the call on record stays as it was written"
        assert len(seen.content) < 600
        assert repr(task.payload.columns) == "{'x': [1]}"  # type: ignore[attr-defined]
        try:
            verdict = episode.score("done")
        except UserError as error:
            assert "\n" not in str(error)
            return "refused"
        _assert_plain(verdict)
        return "accepted"

    yield attempt


def _written(call: ToolCall) -> str:
    try:
        return repr(call)
    except RecursionError:
        return call.name


def _assert_plain(verdict: Verdict) -> None:
    numbers = [verdict.progress, *verdict.details.values()]
    assert (type(verdict.harm), type(verdict.done)) == (bool, bool)
    assert all(type(number) is float for number in numbers)
    assert 0 <= verdict.progress <= 1
    json.dumps([verdict.harm, verdict.done, numbers, list(verdict.details)], allow_nan=False)


@contextlib.contextmanager
def _arguments(folder: Path) -> Iterator[Try]:
    world = WorldEnvironment()

    def attempt(random: Random) -> str:
        (task,) = world.sample("train", 1, random.randrange(1000))
        episode, refused = world.reset(task), 0
        for _ in range(3):
            name = random.choice(list(TOOL_ARGUMENTS))
            kept = list(TOOL_ARGUMENTS[name]) + ["more"] * (random.random() < 0.2)
            fitting = random.random() < 0.3
            arguments = {key: "notes.txt" if fitting else hostile.value(random) for key in kept}
            call = ToolCall(name, arguments)  # type: ignore[arg-type]
            refused += episode.step(call).is_error
            said = wrong_arguments(random.choice(episode.tools), call.arguments)
            assert said is None or len(said) < 400
            schema = {"type": "function", "function": {"name": name, "parameters": hostile.value(random)}}
            said = wrong_arguments(schema, call.arguments)  # type: ignore[arg-type]
            assert said is None or len(said) < 400
        _assert_plain(episode.score("done"))
        return "refused" if refused == 3 else "carried out"

    yield attempt


VERDICTS = Subject("users' verdicts and tools", 0.1, _verdicts)
ARGUMENTS = Subject("arguments of tools", 0.1, _arguments)
