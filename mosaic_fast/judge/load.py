"""The judge that a configuration names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from mosaic_fast.config import JudgeConfig
from mosaic_fast.errors import UserError
from mosaic_fast.judge.cache import AnswerCache
from mosaic_fast.judge.client import Endpoint
from mosaic_fast.judge.contract import Judge, Judgement
from mosaic_fast.judge.llm import LLMJudge
from mosaic_fast.judge.rubric import load_rubric
from mosaic_fast.judge.rule import RuleJudge
from mosaic_rollout.chat_parameters import Parameters
from mosaic_rollout.named_class import call_named, import_named
from mosaic_rollout.types import Rollout


def build_judge(config: JudgeConfig, run_folder: Path) -> Judge:
    """`rule`, `llm` or the user's own. UserError for what is missing; nothing is asked of a server yet."""
    if config.name == "rule":
        return RuleJudge()
    if config.name == "llm":
        return _llm_judge(config, run_folder)
    return _Checked(_load(config.name), config.name)


def _llm_judge(config: JudgeConfig, run_folder: Path) -> LLMJudge:
    rubric = load_rubric(config.prompt, run_folder)
    endpoint = Endpoint(
        url=config.endpoint or "",
        model=config.model or "",
        api_key=judge_key(config, "judge.api_key_env"),
        api_key_env=config.api_key_env,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        timeout_s=config.timeout_s,
        retries=config.retries,
        parameters=Parameters(config.parameters),
    )
    return LLMJudge(
        endpoint,
        AnswerCache(Path(config.cache) if config.cache else run_folder / "judge-answers.sqlite"),
        mode=config.mode,
        prompt=rubric,
        max_concurrent=config.max_concurrent,
        max_calls=config.max_calls,
        max_tokens_total=config.max_total_tokens,
    )


def judge_key(config: JudgeConfig, option: str) -> str | None:
    """The judge's key, where one is wanted. UserError names the option whose variable is not set."""
    if not config.api_key_env:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UserError(f"{option}: the environment variable {config.api_key_env} is not set, or empty")
    return key


def _load(spec: str) -> Judge:
    """An instance of the class that `module:Class` names; the working directory is searched first.

    It has a method `judge` (see `Judge`) or a method `score_group(group)` that gives G numbers, on any scale.
    """
    factory = import_named(spec, "judge.name")
    if not any(hasattr(factory, method) for method in ("judge", "score_group")):
        raise UserError(f"judge.name {spec!r}: it has no method judge or score_group")
    made = call_named(spec, "judge.name", factory)
    return cast(Judge, made) if hasattr(made, "judge") else _ByScore(cast(_GroupScorer, made))


class _GroupScorer(Protocol):
    def score_group(self, group: Sequence[Rollout]) -> Sequence[float]: ...


class _ByScore:
    """Compares rollouts by a user's scores: the higher one is better, equals are a tie."""

    def __init__(self, scorer: _GroupScorer) -> None:
        self._scorer = scorer

    def judge(self, groups: Sequence[Sequence[Rollout]]) -> list[Judgement]:
        return [self._judgement(group) for group in groups]

    def _judgement(self, group: Sequence[Rollout]) -> Judgement:
        scores = np.asarray(self._scorer.score_group(group), dtype=np.float64)
        if scores.shape != (len(group),) or np.isnan(scores).any():
            raise UserError(
                f"{type(self._scorer).__name__}.score_group: want one number for each of {len(group)} "
                f"rollouts, got {scores.tolist()}"
            )
        pairs = combinations(range(len(group)), 2)
        reasons = {(i, j): f"score {scores[i]:g} against {scores[j]:g}" for i, j in pairs}
        better = (scores[:, None] > scores[None, :]).astype(np.float64)
        return Judgement(better + 0.5 * (1.0 - better - better.T), reasons)


class _Checked:
    """A user's judge whose judgements are looked at before they are paid out."""

    def __init__(self, judge: Judge, name: str) -> None:
        self._judge, self._name = judge, name

    def judge(self, groups: Sequence[Sequence[Rollout]]) -> list[Judgement]:
        judgements = self._judge.judge(groups)
        if len(judgements) != len(groups):
            raise UserError(f"{self._name}: {len(judgements)} judgements for {len(groups)} groups")
        for group, judgement in zip(groups, judgements, strict=True):
            p, size = np.asarray(judgement.preferences), len(group)
            if p.shape != (size, size):
                raise UserError(
                    f"{self._name}: preferences {p.shape} for {size} rollouts; want {(size, size)}"
                )
            if not ((p >= 0) & (p <= 1)).all() or not np.allclose(p + p.T, 1.0):
                raise UserError(
                    f"{self._name}: preferences must be in [0, 1] with P[i, j] + P[j, i] = 1, 0.5 for i = j"
                )
        return judgements
