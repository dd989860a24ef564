"""The LLM judge: whole trajectories, both orders, disagreement is a tie (arXiv 2603.03205, section 3)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from itertools import combinations
from typing import TypeVar

import httpx
import numpy as np
from pydantic import BaseModel

from mosaic_fast.preferences.endpoint import Endpoint
from mosaic_fast.preferences.judge import Judgement
from mosaic_fast.preferences.llm_calls import AnswerCache, Asker
from mosaic_fast.preferences.prompt import (
    ANSWERS,
    Mode,
    PairAnswer,
    PointAnswer,
    Rubric,
    ask,
    first_question,
    load_rubric,
    trajectory_data,
)
from mosaic_rollout.types import Rollout

Result = TypeVar("Result")
_FOR_FIRST = {"1": 1.0, "tie": 0.5, "2": 0.0}  # preference for the trajectory shown first


class LLMJudge:
    """Asks a language model.

    pairwise: every pair in both orders; P is 1, 0 or 0.5, and 0.5 where the two orders disagree.
    pointwise: every rollout by itself, a score s in [0, 1]; P[i, j] = 0.5 + (s_i - s_j) / 2, so r_align is
    a scalar reward, with which the paper compares, times G / 2, plus a constant of the group that drops out.

    Identical rollouts are a tie without a call; equal questions are asked once.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        cache: AnswerCache,
        *,
        mode: Mode = "pairwise",
        prompt: str | Rubric = "v1",
        max_concurrent: int = 16,
        max_calls: int = 0,
        max_tokens_total: int = 0,
    ) -> None:
        self._asker = Asker(endpoint, cache, max_calls=max_calls, max_tokens_total=max_tokens_total)
        self._mode: Mode = mode
        self.rubric = load_rubric(prompt) if isinstance(prompt, str) else prompt
        self._max_concurrent = max_concurrent

    def judge(self, groups: Sequence[Sequence[Rollout]]) -> list[Judgement]:
        """TrainingError where the endpoint gives no valid answer, or a limit is reached."""

        async def all_groups() -> list[Judgement]:
            async with self._asker.endpoint.open() as http:
                session = _Session(self, http)
                one = session.pairwise if self._mode == "pairwise" else session.pointwise
                try:
                    return await _together([one(group) for group in groups])
                finally:
                    await session.stop()

        return asyncio.run(all_groups())

    async def answer(
        self, http: httpx.AsyncClient, rollouts: Sequence[Rollout], counts: Counter[str]
    ) -> BaseModel:
        """The judge's answer about rollouts in this order, from the cache or the endpoint."""
        question = ask(self._mode, self.rubric, *rollouts)
        return await self._asker.ask(http, question.messages, ANSWERS[self._mode], counts)

    def probe(self) -> None:
        """Ask one small question, never from the cache, so that what is wrong is known at once.

        It counts towards the limits. TrainingError where no valid answer comes.
        """
        question = first_question(self._mode, self.rubric)

        async def once() -> None:
            async with self._asker.endpoint.open() as http:
                await self._asker.probe(http, question.messages, ANSWERS[self._mode])

        asyncio.run(once())

    def record(self) -> dict[str, object]:
        """What the answers depend on, with the request's parameters as the endpoint takes them."""
        endpoint = self._asker.endpoint
        return {
            "endpoint": endpoint.url,
            "model": endpoint.model,
            "mode": self._mode,
            "prompt": self.rubric.name,
            "prompt_sha256": self.rubric.sha256(self._mode),
            "asked_with": endpoint.asked_with(ANSWERS[self._mode]),
        }

    @property
    def max_concurrent(self) -> int:
        return self._max_concurrent


class _Session:
    """The questions of one training step: a bounded number under way, equal ones asked once."""

    def __init__(self, judge: LLMJudge, http: httpx.AsyncClient) -> None:
        self._judge, self._http = judge, http
        self._room = asyncio.Semaphore(judge.max_concurrent)
        self._asked: dict[str, asyncio.Task[BaseModel]] = {}
        self._failure: Exception | None = None

    async def stop(self) -> None:
        """Drop what is still under way."""
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    async def pairwise(self, group: Sequence[Rollout]) -> Judgement:
        shown = [repr(trajectory_data(rollout)) for rollout in group]
        counts: Counter[str] = Counter(
            dict.fromkeys(("pairs_asked", "flips", "calls", "cache_hits", "retries"), 0)
        )
        pairs = [(i, j) for i, j in combinations(range(len(group)), 2) if shown[i] != shown[j]]
        orders = [order for i, j in pairs for order in ((i, j), (j, i))]
        answers = await _together([self._ask([group[a], group[b]], counts) for a, b in orders])
        preferences = np.full((len(group), len(group)), 0.5)
        reasons = dict.fromkeys(combinations(range(len(group)), 2), "tie: the two are identical")
        for k, (i, j) in enumerate(pairs):
            first, second = answers[2 * k], answers[2 * k + 1]
            assert isinstance(first, PairAnswer)
            assert isinstance(second, PairAnswer)
            forward, backward = _FOR_FIRST[first.winner], 1.0 - _FOR_FIRST[second.winner]
            counts["pairs_asked"] += 1
            names = f"1 is #{group[i].rollout_id}, 2 is #{group[j].rollout_id}"
            if forward == backward:
                preferences[i, j], preferences[j, i] = forward, 1.0 - forward
                reasons[i, j] = f"{first.reason} ({names})"
            else:
                counts["flips"] += 1
                reasons[i, j] = (
                    f"tie: the two orders disagree. {_verdict(first)}: {first.reason} ({names}) "
                    f"Swapped, {_verdict(second)}: {second.reason}"
                )
        return Judgement(preferences, reasons, counts)

    async def pointwise(self, group: Sequence[Rollout]) -> Judgement:
        counts: Counter[str] = Counter(dict.fromkeys(("calls", "cache_hits", "retries"), 0))
        answers = await _together([self._ask([rollout], counts) for rollout in group])
        points = [answer for answer in answers if isinstance(answer, PointAnswer)]
        scores = np.array([point.score / 10 for point in points])
        reasons = {
            (i, j): f"{points[i].score} against {points[j].score} of 10. #{group[i].rollout_id}: "
            f"{points[i].reason} #{group[j].rollout_id}: {points[j].reason}"
            for i, j in combinations(range(len(group)), 2)
        }
        return Judgement(0.5 + (scores[:, None] - scores[None, :]) / 2, reasons, counts)

    async def _ask(self, rollouts: Sequence[Rollout], counts: Counter[str]) -> BaseModel:
        """One question, or the answer to an equal one that is already under way."""
        key = repr([rollouts[0].messages, *(trajectory_data(rollout) for rollout in rollouts)])
        if key not in self._asked:
            self._asked[key] = asyncio.create_task(self._in_turn(rollouts, counts))
        return await asyncio.shield(self._asked[key])

    async def _in_turn(self, rollouts: Sequence[Rollout], counts: Counter[str]) -> BaseModel:
        """The answer, once there is room; after one question failed for good, no other is asked."""
        async with self._room:
            if self._failure is not None:
                raise self._failure
            try:
                return await self._judge.answer(self._http, rollouts, counts)
            except Exception as error:
                self._failure = error
                raise


def _verdict(answer: PairAnswer) -> str:
    return "a tie" if answer.winner == "tie" else f"{answer.winner} is better"


async def _together(work: Sequence[Coroutine[None, None, Result]]) -> list[Result]:
    """All results in order; the first failure stops the others and is raised itself."""
    try:
        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(one) for one in work]
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    return [task.result() for task in started]
