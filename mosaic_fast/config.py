"""The configuration of a run: one frozen model a section. Importable without torch.

The defaults are the run of `make train`: the embedded model in the embedded world. Every field's text below
is what `--help` prints.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section refuses keys it does not know, and cannot be changed once made."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """The policy."""

    path: str = "embedded"
    """Folder of a Hugging Face causal LM (Qwen2, Qwen3, Phi-3/Phi-4, Llama); `embedded`: the one shipped."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations. bfloat16 is meant for GPUs; on a CPU it is much slower."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy lives; auto takes a GPU where there is one, except for the embedded model."""
    threads: int = Field(default=1, ge=0)
    """CPU threads of PyTorch; 0: PyTorch's own choice. More than there are idle cores slow a run badly."""


class EnvConfig(Section):
    """The tasks."""

    name: Literal["world", "agentdojo"] = "world"
    """`world`: the embedded simulated tools. `agentdojo`: AgentDojo's suites (`make train-agentdojo`)."""
    suites: Annotated[tuple[str, ...], Field(strict=False)] = ("banking", "slack")
    """agentdojo: the suites to draw tasks from."""
    attack: str = "important_instructions_no_names"
    """agentdojo: the attack that writes the injections."""
    demonstrations: int = Field(default=0, ge=0)
    """agentdojo: solved training tasks that open every conversation, for models too small to be told."""
    max_observation_chars: Count = 16_000
    """agentdojo: longer tool outputs are cut there, and say so."""
    eval_tasks: int = Field(default=300, ge=0)
    """Held-out tasks in the evaluation before and after training; 0 leaves both out."""
    eval_every: int = Field(default=0, ge=0)
    """Evaluate during training every so many steps on a third of eval_tasks; 0: never."""


class EngineConfig(Section):
    """What samples the rollouts."""

    kind: Literal["local"] = "local"
    """`local`: in process, PyTorch, with a radix-tree cache of keys and values."""
    max_batch: Count = 96
    """Sequences decoded at once."""
    max_cached_tokens: Count = 200_000
    """Tokens the prefix cache may hold; beyond it the least recently used are dropped."""


class RolloutConfig(Section):
    """How tasks are played."""

    prompts_per_step: Count = 16
    """Tasks a training step."""
    group_size: int = Field(default=4, ge=2, le=64)
    """Rollouts a task, compared pair by pair (n in the paper)."""
    branching: Literal["independent", "fork_at_check", "fork_at_step"] = "independent"
    """Where rollouts of a group begin to differ: at the prompt (the paper), after a plan, or at a step."""
    temperature: Positive = 1.0
    """Sampling temperature; the trainer's log-probs use the same one."""
    max_steps: Count = 6
    """Turns of the policy in one rollout."""
    max_step_tokens: Count = 72
    """Sampled tokens of one turn."""
    max_rollout_tokens: Count = 512
    """Tokens of a whole rollout: prompt, turns and observations."""
    teach_loop: bool = False
    """Write the text that teaches plan, check and act into the system message, for models new to it."""


class JudgeConfig(Section):
    """What compares two rollouts."""

    name: Literal["rule"] = "rule"
    """`rule`: from the environment's own verdicts."""


class RewardConfig(Section):
    """R = r_align + r_fmt - p_len, normalised within the group."""

    length_target: Positive = 40.0
    """L0: generated tokens a step above which p_len = (L - L0) / L0 is taken off (400 in the paper)."""
    std_epsilon: NonNegative = 0.1
    """Added to the group's standard deviation, so that tiny differences are not blown up."""
    require_signal: bool = False
    """Stop with an error at a step where every group is a tie or the gradient is zero."""


class LossConfig(Section):
    """The policy loss."""

    name: Literal["grpo"] = "grpo"
    """`grpo`: PPO's clipped ratio with group-normalised advantages, mean over the step's trained tokens."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped above 1 + clip_high."""
    kl_weight: NonNegative = 0.01
    """Weight of the k3 estimate of the KL divergence to the reference policy; 0 loads no reference."""


class OptimConfig(Section):
    """AdamW."""

    lr: Positive = 5e-4
    """Learning rate at the start."""
    final_lr_frac: Fraction = 0.1
    """The rate falls linearly to this share of lr at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises from 0."""
    beta1: Fraction = 0.9
    """Decay of the gradient's average."""
    beta2: Fraction = 0.95
    """Decay of the squared gradient's average."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    grad_clip: Positive = 1.0
    """Largest norm of the gradient."""
    epochs: Count = 2
    """Optimiser steps on the rollouts of one training step. Above 1 the clipped ratio comes into play."""


class ForestConfig(Section):
    """How rollouts are packed for the update."""

    tokens_per_microbatch: Count = 8192
    """Unique tokens forwarded at once; a forest above it is cut, exactly."""
    credit: Literal["sum"] = "sum"
    """Tokens inherited through a fork get the sum of their rollouts' terms: the flat batch's gradient."""


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


class Config(Section):
    """MOSAIC: post-train a tool-using agent to plan, check, then act or refuse."""

    steps: Count = 60
    """Training steps."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of tasks and sampling. Same seed and configuration on a CPU: same bits."""
    run_dir: str | None = None
    """Run folder; default runs/<time>-<name>."""
    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    judge: JudgeConfig = JudgeConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    forest: ForestConfig = ForestConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: TrackersConfig = TrackersConfig()

    @model_validator(mode="after")
    def _contradictions(self) -> Config:
        if self.forest.tokens_per_microbatch < self.rollout.max_rollout_tokens:
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
        if self.env.eval_every and not self.env.eval_tasks:
            raise ValueError("env.eval_every needs env.eval_tasks above 0")
        if self.env.name == "agentdojo" and not self.env.suites:
            raise ValueError("env.suites is empty; name at least one, for example ['banking']")
        return self
