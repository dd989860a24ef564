"""The judge of suites whose graders ask one: which endpoint, and its questions during an evaluation."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from pydantic import BaseModel, ValidationError

from mosaic_fast.config import Config, JudgeConfig
from mosaic_fast.errors import UserError
from mosaic_fast.evaluate.arguments import JUDGE_OPTIONS, Arguments, flag
from mosaic_fast.preferences.endpoint import Endpoint
from mosaic_fast.preferences.llm_calls import AnswerCache, Asker
from mosaic_fast.preferences.load import judge_key
from mosaic_rollout.endpoint.parameters import Parameters

Shape = TypeVar("Shape", bound=BaseModel)
IN_MEMORY = Path(":memory:")


def judge_config(config: Config, arguments: Arguments) -> JudgeConfig:
    """The judge of the options, else of [judge]. UserError where there is none."""
    given = {key: getattr(arguments, f"judge_{key}") for key in JUDGE_OPTIONS}
    chosen = {key: value for key, value in given.items() if value is not None}
    if not chosen and config.judge.name != "llm":
        raise UserError(
            "this suite's grader asks a judge: name an OpenAI-compatible endpoint with --judge-endpoint and "
            '--judge-model, or a --config FILE whose [judge] has name = "llm"'
        )
    base = config.judge.model_dump() if config.judge.name == "llm" else {}
    try:
        return JudgeConfig.model_validate({**base, "name": "llm", **chosen})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        for key in JUDGE_OPTIONS:
            reason = reason.replace(f"judge.{key}", option(key))
        raise UserError(f"the judge: {reason}") from None


def option(key: str) -> str:
    """How a setting of the judge is written on the command line."""
    return flag(f"judge_{key}")


class EvaluationJudge:
    """Asks, `max_concurrent` questions at once; use it as an async context manager.

    cache: a file of answers; IN_MEMORY: for this evaluation alone. option: how a setting is written on the
    command line. counts: what it took.
    """

    def __init__(self, config: JudgeConfig, cache: Path, option: Callable[[str], str] = option) -> None:
        endpoint = Endpoint(
            url=config.endpoint or "",
            model=config.model or "",
            api_key=judge_key(config, option("api_key_env")),
            api_key_env=config.api_key_env,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            timeout_s=config.timeout_s,
            retries=config.retries,
            parameters=Parameters(config.parameters),
            option=option,
            after_failure="No answer was made up",
            after_limit="",
        )
        limits = {"max_calls": config.max_calls, "max_tokens_total": config.max_total_tokens}
        self._asker = Asker(endpoint, AnswerCache(cache), **limits)
        self._max_concurrent = config.max_concurrent
        self.counts: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        self._room = asyncio.Semaphore(self._max_concurrent)
        self._http = self._asker.endpoint.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    @property
    def changes(self) -> tuple[str, ...]:
        """How questions differ from what the options say, because the server refused those parameters."""
        return self._asker.endpoint.parameters.changes

    async def probe(self, messages: Sequence[dict[str, str]], wanted: type[BaseModel] | str) -> None:
        """A first, small question of a shape or a pattern, whose answer is not kept.

        TrainingError where the endpoint gives none.
        """
        await self._asker.probe(self._http, messages, wanted)

    async def ask(self, messages: Sequence[dict[str, str]], shape: type[Shape]) -> Shape:
        """A JSON answer of the given shape. TrainingError where the endpoint gives none."""
        async with self._room:
            return await self._asker.ask(self._http, messages, shape, self.counts)

    async def ask_text(self, prompt: str, shape: str) -> str:
        """A plain answer that matches the regular expression `shape`. TrainingError where there is none."""
        messages = [{"role": "user", "content": prompt}]
        async with self._room:
            return await self._asker.ask_text(self._http, messages, shape, self.counts)
