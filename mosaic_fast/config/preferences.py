"""[judge], [reward]: what compares two rollouts, and what their comparison earns."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mosaic_fast.config.section import (
    Count,
    CountOrZero,
    NonNegative,
    Positive,
    Section,
    is_own,
    is_plain_url,
)
from mosaic_rollout.endpoint.parameters import read_change
from mosaic_rollout.errors import UserError


class JudgeConfig(Section):
    """What compares two rollouts."""

    name: Annotated[str, Field(pattern=r"^(rule|llm|[\w.]+:\w+)$")] = "rule"
    """`rule`: the environment's verdicts; `llm`: a model; `module:Class`: your own (docs/judges.md)."""
    mode: Literal["pairwise", "pointwise"] = "pairwise"
    """llm: every pair (as the paper; in both orders is our choice), or a score a rollout."""
    endpoint: str | None = None
    """llm: an OpenAI-compatible server, for example http://localhost:30000/v1; no user or key in it."""
    model: str | None = None
    """llm: the model's name there."""
    api_key_env: str | None = None
    """llm: the environment variable that holds the key; the key itself is never written anywhere."""
    prompt: str = "v1"
    """llm: `v1`, our prompt, or a Markdown file with a rubric of your own, such as my.md (docs/judges.md)."""
    temperature: NonNegative = 0.0
    """llm: sampling temperature of the judge."""
    max_tokens: Count = 1024
    """llm: longest answer, reasoning included."""
    parameters: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """llm: NAME=OTHER renames a request's max_tokens, temperature or response_format, NAME= leaves it out."""
    timeout_s: Positive = 120.0
    """llm: seconds one call may take."""
    retries: CountOrZero = 4
    """llm: further tries of a call that failed or answered nonsense; then the run stops."""
    max_concurrent: Count = 16
    """llm: calls under way at once."""
    max_calls: CountOrZero = 0
    """llm: calls after which the run stops, counted from its start or resume; 0: no limit."""
    max_total_tokens: int = Field(default=0, ge=0, lt=2**63)
    """llm: tokens, as the server counts them, after which the run stops, counted likewise; 0: no limit."""
    cache: str | None = None
    """llm: file of answers, which runs may share; default judge-answers.sqlite in the run folder."""

    @model_validator(mode="after")
    def _llm_has_an_endpoint(self) -> JudgeConfig:
        missing = [key for key in ("endpoint", "model") if self.name == "llm" and getattr(self, key) is None]
        if missing:
            raise ValueError(f"judge.name = 'llm' needs judge.{missing[0]}")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env, re.ASCII):
            raise ValueError(  # without the value: it may well be a key
                "judge.api_key_env is the name of an environment variable, such as JUDGE_API_KEY, not a key"
            )
        if self.prompt != "v1" and not self.prompt.endswith(".md"):
            raise ValueError(
                f"judge.prompt = {self.prompt!r}: it is v1, or a Markdown file of your own that ends in .md"
            )
        for change in self.parameters:
            try:
                read_change(change)
            except UserError as error:
                raise ValueError(f"judge.parameters: {error}") from None
        if self.endpoint is not None and not is_plain_url(self.endpoint):
            raise ValueError(
                "judge.endpoint must look like http://localhost:30000/v1, with no user or key in it, its "
                "path included, and no question mark; the key belongs in the environment variable that "
                "judge.api_key_env names"
            )
        return self


REWARD_PARTS = ("align", "format", "length")
"""Names of `reward.parts` beside module:function."""
_FIGURES = ("total", "total_std", "length_penalty", "tied_groups_frac", "length_only_frac")


class RewardConfig(Section):
    """R = r_align + r_fmt - p_len, normalised within the group."""

    parts: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = REWARD_PARTS
    """What R is the sum of: align, format, length (-p_len); your own: `module:function` (docs/method.md)."""
    advantage: str = "group"
    """`group`: centred and divided within the group; your own: `module:function` (docs/method.md)."""
    length_target: Positive = 40.0
    """L0 of p_len = max(0, (L - L0) / L0), in tokens a step; by the kind of model, 400 for others."""
    divide_by_std: bool | None = None
    """Divide centred rewards by the group's standard deviation; default: yes, but not for loss dr_grpo."""
    std_epsilon: NonNegative = 0.1
    """Added to the group's standard deviation, so that tiny differences are not blown up."""
    require_signal: bool = False
    """Stop at a step where every group is a tie or the gradient is zero, and say why."""

    @model_validator(mode="after")
    def _names(self) -> RewardConfig:
        for part in self.parts:
            if part not in REWARD_PARTS and not is_own(part):
                raise ValueError(
                    f"reward.parts: {part!r} is none of {', '.join(REWARD_PARTS)}, nor your own as "
                    "module:function"
                )
        names = [part.rpartition(":")[2] for part in self.parts]
        for part, name in zip(self.parts, names, strict=True):
            if names.count(name) > 1 or (is_own(part) and name in (*REWARD_PARTS, *_FIGURES)):
                raise ValueError(f"reward.parts: the name {name!r} is taken, and reward/{name} would be two")
        if self.advantage != "group" and not is_own(self.advantage):
            raise ValueError(
                f"reward.advantage {self.advantage!r} is neither 'group' nor your own as module:function"
            )
        if self.advantage != "group" and self.divide_by_std is not None:
            raise ValueError("reward.divide_by_std has no meaning beside reward.advantage; leave it out")
        return self
