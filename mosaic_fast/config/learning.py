"""[model], [loss], [off_policy], [optim], [forest]: what is trained, and on what."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from inspect import signature
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mosaic_fast.config.section import Count, CountOrZero, Fraction, NonNegative, Positive, Section, is_own
from mosaic_fast.losses import LOSSES, Normalisation, build_loss, loss_class


class ModelConfig(Section):
    """The policy."""

    path: str = "embedded"
    """Folder of a Hugging Face causal LM (docs/method.md, Models), or of a run, for its newest checkpoint;
    `org/name@revision`: of the hub; `embedded`: the one shipped."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations. bfloat16 is meant for GPUs; on a CPU it is much slower."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy lives; auto takes a GPU where there is one, except for the embedded model."""
    threads: CountOrZero = 1
    """CPU threads of PyTorch; 0: PyTorch's own choice. More than there are idle cores slow a run badly."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and run the layer again in the backward pass: less memory, more time."""
    attention: Literal["auto", "triton", "flex", "flash", "reference"] = "auto"
    """What computes attention; auto on a GPU: triton, and flex or reference where it has no kernel."""
    lm_head: Literal["auto", "triton", "chunked", "reference"] = "auto"
    """What computes log-probs from the last hidden states; auto on a GPU: triton, and chunked where not."""
    lora_rank: CountOrZero = 0
    """Train low-rank adapters of this rank (needs peft: the extra `lora`); 0: train every weight."""
    lora_alpha: Count | None = None
    """LoRA: adapters are scaled by lora_alpha / lora_rank; default twice the rank."""
    lora_targets: Annotated[tuple[str, ...], Field(strict=False)] = ("all-linear",)
    """LoRA: names of the modules that get an adapter, such as q_proj; `all-linear`: all but the LM head."""


@dataclass(frozen=True)
class LossSettings:
    """The settings of a loss in full: its own, where the configuration leaves them open."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    normalisation: Normalisation = "token"
    kl_weight: float = 0.0
    beta: float = 0.1


_SETTINGS = tuple(field.name for field in fields(LossSettings))
Option = bool | int | float | str


PAIRWISE_LOSSES = tuple(name for name in LOSSES if loss_class(name).pairwise)
_READ = {
    name: {p.name: p.default for p in signature(loss_class(name)).parameters.values() if p.name in _SETTINGS}
    for name in LOSSES
}
"""Name of a loss -> the settings that it reads, as its class has them."""
OWN_SETTINGS = {name: LossSettings(**read) for name, read in _READ.items()}


class LossConfig(Section):
    """The policy loss."""

    name: str = "grpo"
    """On rewards: grpo, dapo, dr_grpo, gspo, cispo. On judged pairs: dpo, dpo_norm, ipo (docs/method.md).
    On conversations, the cold start: sft. Your own: `module:Class`."""
    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The ratio is clipped below 1 - clip_low; default 0.2, gspo 0.0003, cispo 1 (never)."""
    clip_high: Positive | None = None
    """The ratio is clipped above 1 + clip_high; default 0.2, dapo 0.28, gspo 0.0004, cispo 4."""
    normalisation: Normalisation | None = None
    """What sums over tokens are divided by: token, sequence (default of gspo) or constant (of dr_grpo)."""
    kl_weight: NonNegative | None = None
    """Weight of the k3 estimate of the KL divergence to the reference; default 0.01 for grpo, else 0."""
    entropy_weight: NonNegative = 0.0
    """Weight of the policy's mean entropy, as a bonus."""
    beta: Positive | None = None
    """Pairwise losses: how closely the reference is kept; default 0.1, dpo_norm 5."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    """What computes the loss of log-probs; auto: triton on a GPU. Your own loss does not read it."""
    options: dict[str, Option] = Field(default_factory=dict)
    """module:Class: settings of its own, given to the class as keyword arguments."""

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in LOSSES and not is_own(value):
            raise PydanticCustomError(
                "loss",
                "Input should be one of {names}, or your own as module:Class",
                {"names": ", ".join(map(repr, LOSSES))},
            )
        return value

    @property
    def is_own(self) -> bool:
        """Whether it is a user's loss."""
        return is_own(self.name)

    @property
    def is_pairwise(self) -> bool:
        return (build_loss(self) if self.is_own else loss_class(self.name)).pairwise

    @property
    def needs_reference(self) -> bool:
        return build_loss(self).needs_reference

    @property
    def own_settings(self) -> dict[str, Option]:
        """What a loss of ours is made with: what is configured, and its own where nothing is."""
        found = _READ[self.name] | {"entropy_weight": self.entropy_weight, "backend": self.backend}
        return found | {key: value for key in found if (value := getattr(self, key)) is not None}

    @property
    def settings(self) -> LossSettings:
        """What is configured, and the loss's own where it is not."""
        chosen = {name: value for name in _SETTINGS if (value := getattr(self, name)) is not None}
        return replace(OWN_SETTINGS.get(self.name, LossSettings()), **chosen)

    def resolved(self) -> LossConfig:
        """With every value that the loss itself decides written out."""
        return self if self.is_own else self.model_copy(update=self.own_settings)

    @model_validator(mode="after")
    def _contradictions(self) -> LossConfig:
        read = ("kl_weight", "normalisation") if self.is_own else _READ[self.name]
        for name in _SETTINGS:
            if getattr(self, name) and name not in read:
                instead = f"; if it reads one, set loss.options.{name}" if self.is_own else "; leave it out"
                raise ValueError(f"loss.{name} has no meaning for loss.name = {self.name!r}{instead}")
        if self.options and not self.is_own:
            raise ValueError(
                f"loss.options are those of a loss of your own; loss.name is {self.name!r}, leave them out"
            )
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

    tokens_per_microbatch: CountOrZero = 8192
    """Tokens forwarded and held at once, at least those of a rollout; a larger forest is cut, exactly.
    0: what the GPU's memory allows (--dry-run), on a CPU 8192."""
    cost_model: str = "default"
    """File of `python -m mosaic_fast.learner.calibrate`: what work costs, to choose how a forest is run."""
    credit: Literal["sum", "mean", "first", "subtree"] = "sum"
    """What an inherited token gets: all its holders' terms, their mean, its sampler's, or its branch's."""
