"""A whole configuration: its sections, what in one contradicts another, and the seeds of its parts."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mosaic_fast.config.kinds import with_defaults_of_kind
from mosaic_fast.config.learning import ForestConfig, LossConfig, ModelConfig, OffPolicyConfig, OptimConfig
from mosaic_fast.config.preferences import JudgeConfig, RewardConfig
from mosaic_fast.config.presets import check_preset
from mosaic_fast.config.rollout import AttacksConfig, EngineConfig, EnvConfig, RolloutConfig
from mosaic_fast.config.section import Count, Section, is_plain_url
from mosaic_fast.config.sft import SftConfig
from mosaic_fast.losses import build_loss, loss_class


def derived_seed(seed: int, purpose: str, step: int) -> int:
    """A seed in [0, 2**62) that is independent for every (seed, purpose, step)."""
    digest = hashlib.sha256(f"{seed}|{purpose}|{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


class CheckpointConfig(Section):
    """What is kept on disk."""

    every: Count = 1
    """Training steps between checkpoints; the last step always has one."""
    keep: Count = 3
    """Newest checkpoints kept."""


class TrackersConfig(Section):
    """Where progress is shown, beside metrics.jsonl."""

    console: Literal["auto", "live", "plain", "quiet"] = "auto"
    """live: a table that redraws itself; plain: a line a step; auto: live on a terminal, else plain."""
    log_to: Annotated[tuple[Literal["wandb", "trackio", "tensorboard"], ...], Field(strict=False)] = ()
    """Trackers that get every metric as well: wandb, trackio, tensorboard (extras of the same names)."""
    project: str = "mosaic_fast"
    """wandb, trackio: the project that the run appears in."""


class Config(Section):
    """MOSAIC: post-train a tool-using agent to plan, check, then act or refuse."""

    steps: Count = 60
    """Training steps."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of tasks and sampling. Same seed and configuration on a CPU: same bits."""
    run_dir: str | None = None
    """Run folder; default runs/<time>-<name>."""
    preset: str | None = None
    """laptop, lora-24gb or full-80gb: values for such a machine and a model of yours; what you give wins."""
    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    attacks: AttacksConfig = AttacksConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    judge: JudgeConfig = JudgeConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    off_policy: OffPolicyConfig = OffPolicyConfig()
    sft: SftConfig = SftConfig()
    optim: OptimConfig = OptimConfig()
    forest: ForestConfig = ForestConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: TrackersConfig = TrackersConfig()

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        return None if value is None else check_preset(value)

    @model_validator(mode="before")
    @classmethod
    def _by_the_kind_of_model(cls, values: object) -> object:
        return with_defaults_of_kind(values)

    @model_validator(mode="after")
    def _contradictions(self) -> Config:
        if 0 < self.forest.tokens_per_microbatch < self.rollout.max_rollout_tokens:
            raise ValueError(
                f"forest.tokens_per_microbatch ({self.forest.tokens_per_microbatch}) is below "
                f"rollout.max_rollout_tokens ({self.rollout.max_rollout_tokens}): the longest rollout would "
                "not fit a micro-batch; raise the first or lower the second"
            )
        if self.rollout.max_step_tokens > self.rollout.max_rollout_tokens:
            raise ValueError(
                f"rollout.max_step_tokens ({self.rollout.max_step_tokens}) is above "
                f"rollout.max_rollout_tokens ({self.rollout.max_rollout_tokens}); a turn is part of a rollout"
            )
        if self.optim.warmup_steps >= self.steps > 1:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be below steps ({self.steps})"
            )
        if self.engine.urls and self.engine.kind != "sglang":
            raise ValueError(f"engine.urls needs engine.kind = 'sglang', not {self.engine.kind!r}")
        for url in self.engine.urls:
            if not is_plain_url(url):
                raise ValueError(
                    "engine.urls: each must look like http://127.0.0.1:30000, with no user or key in it, its "
                    "path included, and no question mark"
                )
        if self.env.eval_every and not self.env.eval_tasks:
            raise ValueError("env.eval_every needs env.eval_tasks above 0")
        if not self.loss.is_own and (wrong := self.wrong_for_loss(loss_class(self.loss.name).pairwise)):
            raise ValueError(wrong)
        if self.forest.credit == "subtree" and self.rollout.branching == "independent":
            raise ValueError(
                "forest.credit = 'subtree' compares branches of a fork, and rollout.branching = "
                "'independent' has none: every advantage would be 0; use 'fork_at_check' or 'fork_at_step'"
            )
        if self.env.name.startswith("agent:") and self.rollout.branching != "independent":
            raise ValueError(
                f"rollout.branching = {self.rollout.branching!r} plays a trunk's tool calls again, and "
                f"env.name = {self.env.name!r} runs its own: leave it 'independent'"
            )
        if self.rollout.max_staleness:
            self._check_staleness()
        if self.rollout.gate_contrast:
            self._check_gate_contrast()
        if self.sft.is_set:
            self._check_supervised()
        if self.env.name == "agent_safetybench" and self.judge.name == "rule":
            raise ValueError(
                "env.name = 'agent_safetybench' has no verdicts, so judge.name = 'rule' finds nothing but "
                "ties; use judge.name = 'llm' or your own"
            )
        if not self.model.lora_rank and (
            self.model.lora_alpha is not None or self.model.lora_targets != ("all-linear",)
        ):
            raise ValueError("model.lora_alpha and model.lora_targets need model.lora_rank above 0")
        return self

    def wrong_for_loss(self, pairwise: bool) -> str | None:
        """What else is configured that a loss on judged pairs has no use for; None where nothing is.

        A user's own loss is asked for it once it is loaded, which a configuration does not do.
        """
        if pairwise and self.forest.credit != "sum":
            return (
                f"forest.credit = {self.forest.credit!r} needs a loss on rewards; loss.name = "
                f"{self.loss.name!r} compares whole rollouts, so leave credit at 'sum'"
            )
        if pairwise and self.off_policy.corrects:
            return (
                f"off_policy corrects losses on rewards; loss.name = {self.loss.name!r} takes rollouts from "
                "any policy, so leave it out"
            )
        return None

    def _check_staleness(self) -> None:
        if self.engine.kind != "sglang" or self.engine.colocated:
            raise ValueError(
                "rollout.max_staleness above 0 samples beside the trainer: it needs engine.kind = 'sglang' "
                "and servers that are not colocated"
            )
        if not self.off_policy.corrects:
            raise ValueError(
                "rollout.max_staleness above 0 trains on rollouts of older weights: set "
                "off_policy.truncate_at, for example 2.0, so that they are weighed accordingly"
            )

    def _check_gate_contrast(self) -> None:
        wanted = {
            "rollout.branching": (self.rollout.branching, "fork_at_check"),
            "forest.credit": (self.forest.credit, "sum"),
            "off_policy.*": ("set" if self.off_policy.corrects else "unset", "unset"),
        }
        for key, (found, needed) in wanted.items():
            if found != needed:
                raise ValueError(f"rollout.gate_contrast needs {key} = {needed!r}, it is {found!r}")
        if self.loss.is_own or not build_loss(self.loss).takes_gates:
            raise ValueError(
                "rollout.gate_contrast needs a loss with a clipped ratio a token: grpo, dapo or dr_grpo, not "
                f"loss.name = {self.loss.name!r}"
            )

    def _check_supervised(self) -> None:
        if self.loss.name != "sft" and not self.loss.is_own:
            raise ValueError(
                f"[sft] needs loss.name = 'sft' or your own, it is {self.loss.name!r}: leave it out"
            )
        wanted = {
            "rollout.temperature": (self.rollout.temperature, 1.0),
            "forest.credit": (self.forest.credit, "sum"),
            "rollout.max_staleness": (self.rollout.max_staleness, 0),
            "off_policy.*": ("set" if self.off_policy.corrects else "unset", "unset"),
        }
        for key, (found, needed) in wanted.items():
            if found != needed:
                raise ValueError(f"[sft] needs {key} = {needed!r}, it is {found!r}: nothing is sampled")
        if self.sft.plans == "llm" and (self.judge.endpoint is None or self.judge.model is None):
            raise ValueError("sft.plans = 'llm' needs judge.endpoint and judge.model, which write the plans")

    def resolved(self) -> Config:
        """Every value that the loss decides written out, as a run folder keeps it."""
        divide = self.reward.divide_by_std
        if divide is None and self.reward.advantage == "group":
            divide = self.loss.is_own or loss_class(self.loss.name).divide_by_std
        return self.model_copy(
            update={
                "loss": self.loss.resolved(),
                "reward": self.reward.model_copy(update={"divide_by_std": divide}),
            }
        )
