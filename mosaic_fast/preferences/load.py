"""The judge that a configuration names."""

from __future__ import annotations

import os
from pathlib import Path

from mosaic_fast.config import JudgeConfig
from mosaic_fast.errors import UserError
from mosaic_fast.preferences.endpoint import Endpoint
from mosaic_fast.preferences.judge import Judge
from mosaic_fast.preferences.llm_calls import AnswerCache
from mosaic_fast.preferences.llm_judge import LLMJudge
from mosaic_fast.preferences.own_judge import load_judge
from mosaic_fast.preferences.prompt import load_rubric
from mosaic_fast.preferences.rule_judge import RuleJudge
from mosaic_rollout.endpoint.parameters import Parameters


def build_judge(config: JudgeConfig, run_folder: Path) -> Judge:
    """`rule`, `llm` or the user's own. UserError for what is missing; nothing is asked of a server yet."""
    if config.name == "rule":
        return RuleJudge()
    if config.name == "llm":
        return _llm_judge(config, run_folder)
    return load_judge(config.name)


def judge_endpoint(config: JudgeConfig) -> Endpoint:
    """The endpoint that [judge] names. UserError where its key is not there."""
    return Endpoint(
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


def _llm_judge(config: JudgeConfig, run_folder: Path) -> LLMJudge:
    rubric = load_rubric(config.prompt, run_folder)
    return LLMJudge(
        judge_endpoint(config),
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
