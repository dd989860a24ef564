"""[rollout]: how tasks are played."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mosaic_fast.config.section import Count, CountOrZero, Positive, Section


class RolloutConfig(Section):
    """How tasks are played."""

    prompts_per_step: Count = 16
    """Tasks a training step."""
    group_size: int = Field(default=4, ge=2, le=64)
    """Rollouts a task, compared pair by pair (n; 4 is reported of the paper)."""
    branching: Literal["independent", "fork_at_check", "fork_at_step"] = "independent"
    """Where rollouts of a group begin to differ: at the prompt (as in GRPO), after a plan, or at a step."""
    gate_contrast: bool = False
    """fork_at_check: take the gate both ways and train it with its all-action gradient (docs/gate.md)."""
    max_staleness: CountOrZero = 0
    """sglang: updates that rollouts may be old, sampled while earlier steps train; 0: exactly on policy."""
    temperature: Positive = 1.0
    """Sampling temperature; the trainer's log-probs use the same one."""
    max_steps: Count = 6
    """Turns of the policy in one rollout; default by the kind of model, 10 for others."""
    max_step_tokens: Count = 72
    """Sampled tokens of one turn; default by the kind of model, 1024 for others."""
    max_rollout_tokens: Count = 512
    """Tokens of a whole rollout, prompt and observations included; by the kind of model, 8192 for others."""
    teach_loop: bool = False
    """Teach plan, check and act in the system message; by the kind of model, true for others."""
    date: str | None = None
    """The date, as 2026-07-01, that chat templates see which ask for one; default: the day of the start."""

    @property
    def today(self) -> datetime.date | None:
        """The date that templates see; None: nothing is said of it."""
        return None if self.date is None else datetime.date.fromisoformat(self.date)

    @field_validator("date")
    @classmethod
    def _a_day(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                datetime.date.fromisoformat(value)
            except ValueError:
                raise PydanticCustomError("date", "it is no date; write it as 2026-07-01") from None
        return value

    @model_validator(mode="before")
    @classmethod
    def _whole_distribution(cls, values: object) -> object:
        """Named here, since a key that does not exist would not say why."""
        refused = [name for name in ("top_p", "top_k") if isinstance(values, dict) and name in values]
        if refused:
            raise ValueError(
                f"{refused[0]} cannot be used in training: the trainer's log-probs are those of the whole "
                "distribution, so tokens must be sampled from it; use rollout.temperature"
            )
        return values
