"""[optim]: the optimiser."""

from __future__ import annotations

from mosaic_fast.config.section import Count, CountOrZero, Fraction, NonNegative, Positive, Section


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
