"""The judge that a configuration names."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mosaic_fast.config import JudgeConfig
from mosaic_fast.errors import UserError
from mosaic_fast.judge.cache import AnswerCache
from mosaic_fast.judge.client import Endpoint
from mosaic_fast.judge.contract import Judge, Judgement
from mosaic_fast.judge.llm import LLMJudge
from mosaic_fast.judge.rule import RuleJudge
from mosaic_rollout.types import Rollout


def build_judge(config: JudgeConfig, run_folder: Path) -> Judge:
    """`rule`, `llm` or the user's own. UserError for what is missing; nothing is asked of a server yet."""
    if config.name == "rule":
        return RuleJudge()
    if config.name == "llm":
        return _llm_judge(config, run_folder)
    return _Checked(_load(config.name), config.name)


def _llm_judge(config: JudgeConfig, run_folder: Path) -> LLMJudge:
    key = None
    if config.api_key_env:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise UserError(f"judge.api_key_env: the environment variable {config.api_key_env} is not set")
    endpoint = Endpoint(
        url=config.endpoint or "",
        model=config.model or "",
        api_key=key,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        timeout_s=config.timeout_s,
        retries=config.retries,
    )
    return LLMJudge(
        endpoint,
        AnswerCache(Path(config.cache) if config.cache else run_folder / "judge-answers.sqlite"),
        mode=config.mode,
        prompt=config.prompt,
        max_concurrent=config.max_concurrent,
        max_calls=config.max_calls,
        max_tokens_total=config.max_total_tokens,
    )


def _load(spec: str) -> Judge:
    """An instance of the class that `module:Class` names; the working directory is searched first."""
    module_name, _, class_name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        detail = f"{type(error).__name__}: {error}"
        raise UserError(f"judge.name {spec!r}: cannot import {module_name!r} ({detail})") from error
    factory = getattr(module, class_name, None)
    if factory is None or not callable(getattr(factory, "judge", None)):
        raise UserError(f"judge.name {spec!r}: {module_name} has no class {class_name!r} with a method judge")
    try:
        return factory()
    except Exception as error:  # as above
        raise UserError(
            f"judge.name {spec!r}: {class_name}() failed: {type(error).__name__}: {error}"
        ) from error


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
