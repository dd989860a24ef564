"""[model], [loss], [off_policy], [optim], [forest]: what is trained, and on what."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mosaic_fast.config.section import Count, CountOrZero, Fraction, NonNegative, Positive, Section


class ModelConfig(Section):
    """The policy."""

    path: str = "embedded"
    """Folder of a Hugging Face causal LM (Qwen2, Qwen3, Phi-3/Phi-4, Llama); `embedded`: the one shipped."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations. bfloat16 is meant for GPUs; on a CPU it is much slower."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy lives; auto takes a GPU where there is one, except for the embedded model."""
    threads: CountOrZero = 1
    """CPU threads of PyTorch; 0: PyTorch's own choice. More than there are idle cores slow a run badly."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and run the layer again in the backward pass: less memory, more time."""
    lora_rank: CountOrZero = 0
    """Train low-rank adapters of this rank (needs peft: the extra `lora`); 0: train every weight."""
    lora_alpha: Count | None = None
    """LoRA: adapters are scaled by lora_alpha / lora_rank; default twice the rank."""
    lora_targets: Annotated[tuple[str, ...], Field(strict=False)] = ("all-linear",)
    """LoRA: names of the modules that get an adapter, such as q_proj; `all-linear`: all but the LM head."""


LossName = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "dpo", "dpo_norm", "ipo"]
PAIRWISE_LOSSES = ("dpo", "dpo_norm", "ipo")


@dataclass(frozen=True)
class LossSettings:
    """The settings of a loss in full: its own, where the configuration leaves them open."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    normalisation: Literal["token", "sequence", "constant"] = "token"
    kl_weight: float = 0.0
    beta: float = 0.1


OWN_SETTINGS: dict[LossName, LossSettings] = {
    "grpo": LossSettings(kl_weight=0.01),
    "dapo": LossSettings(clip_high=0.28),
    "dr_grpo": LossSettings(normalisation="constant"),
    "gspo": LossSettings(clip_low=3e-4, clip_high=4e-4, normalisation="sequence"),
    "cispo": LossSettings(clip_low=1.0, clip_high=4.0),
    "dpo": LossSettings(),
    "dpo_norm": LossSettings(beta=5.0),
    "ipo": LossSettings(),
}


class LossConfig(Section):
    """The policy loss."""

    name: LossName = "grpo"
    """On rewards: grpo, dapo, dr_grpo, gspo, cispo. On judged pairs: dpo, dpo_norm, ipo (docs/method.md)."""
    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The ratio is clipped below 1 - clip_low; default 0.2, gspo 0.0003, cispo 1 (never)."""
    clip_high: Positive | None = None
    """The ratio is clipped above 1 + clip_high; default 0.2, dapo 0.28, gspo 0.0004, cispo 4."""
    normalisation: Literal["token", "sequence", "constant"] | None = None
    """What sums over tokens are divided by: token, sequence (default of gspo) or constant (of dr_grpo)."""
    kl_weight: NonNegative | None = None
    """Weight of the k3 estimate of the KL divergence to the reference; default 0.01 for grpo, else 0."""
    entropy_weight: NonNegative = 0.0
    """Weight of the policy's mean entropy, as a bonus."""
    beta: Positive | None = None
    """Pairwise losses: how closely the reference is kept; default 0.1, dpo_norm 5."""

    @property
    def is_pairwise(self) -> bool:
        return self.name in PAIRWISE_LOSSES

    @property
    def needs_reference(self) -> bool:
        return self.is_pairwise or self.settings.kl_weight > 0

    @property
    def settings(self) -> LossSettings:
        """What is configured, and the loss's own where it is not."""
        own = OWN_SETTINGS[self.name]
        chosen = {name: getattr(self, name) for name in asdict(own) if getattr(self, name) is not None}
        return replace(own, **chosen)

    @model_validator(mode="after")
    def _contradictions(self) -> LossConfig:
        unread = ["clip_low", "clip_high", "normalisation", "kl_weight"] if self.is_pairwise else ["beta"]
        for name in unread:
            if getattr(self, name):
                raise ValueError(f"loss.{name} has no meaning for loss.name = {self.name!r}; leave it out")
        return self


class OffPolicyConfig(Section):
    """What to do where the engine's log-probs differ from the trainer's. Default: nothing but `mismatch/`."""

    truncate_at: Positive | None = None
    """Weigh each token by the ratio trainer / engine, at most this (truncated importance sampling)."""
    mask_below: NonNegative | None = None
    """Weigh each token by that ratio, and by 0 where the ratio is below this."""
    mask_above: Positive | None = None
    """Weigh each token by that ratio, and by 0 where the ratio is above this."""

    @property
    def masks(self) -> bool:
        return self.mask_below is not None or self.mask_above is not None

    @property
    def corrects(self) -> bool:
        return self.truncate_at is not None or self.masks

    @model_validator(mode="after")
    def _contradictions(self) -> OffPolicyConfig:
        low, high = self.mask_below, self.mask_above
        if low is not None and high is not None and low >= high:
            raise ValueError(f"off_policy.mask_below ({low}) must be below off_policy.mask_above ({high})")
        return self


class OptimConfig(Section):
    """AdamW."""

    lr: Positive = 5e-4
    """Learning rate at the start; by the kind of model, for others 1e-6, and 1e-5 for adapters."""
    final_lr_frac: Fraction = 0.1
    """The rate falls linearly to this share of lr, reached at the last step."""
    schedule_steps: Count | None = None
    """Steps over which the rate falls, after which it stays; default: steps."""
    warmup_steps: CountOrZero = 0
    """Steps over which the rate rises from 0."""
    beta1: Fraction = 0.9
    """Decay of the gradient's average."""
    beta2: Fraction = 0.95
    """Decay of the squared gradient's average."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices; norms, biases and embeddings are spared."""
    grad_clip: Positive = 1.0
    """Largest norm of the gradient."""
    epochs: Count = 2
    """Optimiser steps a training step; above 1 the clip is in play. By the kind of model, 1 for others."""
    master_weights: bool = True
    """bfloat16 models: update fp32 copies of the weights and round; without, small updates are lost."""


class ForestConfig(Section):
    """How rollouts are packed for the update."""

    tokens_per_microbatch: Count = 8192
    """Tokens forwarded and held at once; a forest above it is cut, exactly. At least those of a rollout."""
    cost_model: str = "default"
    """File of `python -m mosaic_fast.learner.calibrate`: what work costs, to choose how a forest is run."""
    credit: Literal["sum", "mean", "first", "subtree"] = "sum"
    """What an inherited token gets: all its holders' terms, their mean, its sampler's, or its branch's."""
