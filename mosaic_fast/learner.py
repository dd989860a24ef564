"""One update on the forest of a step's rollouts: forward, loss, backward, optimiser.

Every distinct (prefix, token) is computed once, and the gradient is that of the flat batch. A forest above
the token budget is cut exactly; the order of parts changes the gradient by rounding only.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mosaic_fast.config import Config
from mosaic_fast.errors import TrainingError
from mosaic_fast.execution import Execution, Piece
from mosaic_fast.loss import GRPOLoss, LossBatch, SumCount
from mosaic_fast.policy import Policy
from mosaic_kernels import PackedForest, ideal_speedup


class Learner:
    """Owns the optimiser. `reference` is the frozen policy of the KL term, or None."""

    def __init__(self, policy: Policy, reference: Policy | None, config: Config) -> None:
        self.policy, self.reference, self._config = policy, reference, config
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in policy.model.parameters() if parameter.requires_grad],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )
        loss = config.loss
        self._execution = Execution(
            config.forest.tokens_per_microbatch, config.rollout.temperature, policy.model.config
        )
        self._loss = GRPOLoss(loss.clip_low, loss.clip_high, loss.kl_weight)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to final_lr_frac at the last step. step counts from 0."""
        optim, steps = self._config.optim, self._config.steps
        if step < optim.warmup_steps:
            return optim.lr * (step + 1) / optim.warmup_steps
        passed = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
        return optim.lr * (1.0 - (1.0 - optim.final_lr_frac) * passed)

    def update(
        self, forest: PackedForest, sampler_logprobs: np.ndarray, advantages: np.ndarray, step: int
    ) -> dict[str, float]:
        """Train on the forest of R rollouts; returns metrics by name.

        sampler_logprobs: [T] float32, the engine's. advantages: [R], one a rollout.
        Raises TrainingError where a gradient is not finite; no step is taken with it.
        """
        schedule = self._execution.schedule(forest)
        total_tokens = float(max(1, forest.trained.sum()))
        token_advantages = self._tensor(np.repeat(advantages, np.diff(forest.cu_seqlens)))
        sampler = self._tensor(sampler_logprobs)
        reference = None
        if self.reference is not None:
            reference, _ = self._execution.logprobs(self.reference, schedule)
        start: Tensor | None = None
        totals: dict[str, SumCount] = {}
        rate, norms, dropped = self.learning_rate(step), [], 0
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for _ in range(self._config.optim.epochs):
            measured = torch.zeros_like(sampler)

            def loss_of(piece: Piece, measured: Tensor = measured, start: Tensor | None = start) -> Tensor:
                nonlocal dropped
                logprobs = piece.logprobs.detach()
                measured[piece.source] = logprobs
                mask = torch.isfinite(logprobs)
                dropped += int((~mask).sum())
                batch = LossBatch(
                    start_logprobs=logprobs if start is None else start[piece.source],
                    reference_logprobs=None if reference is None else reference[piece.source],
                    advantages=token_advantages[piece.source],
                    mask=mask,
                    total_tokens=total_tokens,
                )
                loss, metrics = self._loss(piece.logprobs, batch, piece.entropy)
                for name, value in metrics.items():
                    totals[name] = totals.get(name, SumCount(0.0, 0.0)) + value
                return loss

            self._execution.backward(self.policy, schedule, loss_of)
            if start is None:  # before the first optimiser step: the policy that the rollouts came from
                start = measured
            norms.append(self._optimizer_step(step))
        epochs = self._config.optim.epochs
        figures = {name: value.mean if value.count else value.sum / epochs for name, value in totals.items()}
        assert start is not None
        return {
            **figures,
            **_mismatch(sampler, start, torch.from_numpy(forest.trained).to(self._device)),
            "policy/dropped_tokens": float(dropped),
            "optim/grad_norm": sum(norms) / len(norms),
            "optim/lr": rate,
            "tree/raw_tokens": float(forest.num_tokens),
            "tree/unique_tokens": float(forest.num_nodes),
            "tree/sharing": forest.num_tokens / max(1, forest.num_nodes),
            "tree/ideal_speedup": ideal_speedup(forest, self.policy.model.config),
            "tree/microbatches": float(len(schedule.parts)),
            "tree/packed_tokens": float(schedule.packed_tokens),
        }

    @property
    def _device(self) -> torch.device:
        return next(self.policy.model.parameters()).device

    def _tensor(self, values: np.ndarray) -> Tensor:
        """Per-token values beside log-probs: fp32, or fp64 for a fp64 policy."""
        double = next(self.policy.model.parameters()).dtype == torch.float64
        return torch.from_numpy(values).to(self._device, torch.float64 if double else torch.float32)

    def _optimizer_step(self, step: int) -> float:
        """Clip, check, step; returns the gradient's norm before clipping."""
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), self._config.optim.grad_clip)
        )
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise TrainingError(
                f"the gradient of step {step} is not finite (norm {norm}); the last checkpoint is intact. "
                "Lower optim.lr or optim.grad_clip, raise loss.kl_weight, or look at the step's trajectories"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not all(bool(torch.isfinite(p).all()) for p in self.policy.model.parameters()):
            raise TrainingError(
                f"the weights are not finite after step {step}; the last checkpoint is intact. Lower optim.lr"
            )
        return norm


def _mismatch(sampler: Tensor, start: Tensor, trained: Tensor) -> dict[str, float]:
    """How far the engine's log-probs [T] are from the trainer's own, over trained tokens."""
    difference = (start - sampler)[trained].double()
    if not len(difference):
        return {"mismatch/kl": 0.0, "mismatch/ratio_mean": 1.0, "mismatch/ratio_max": 1.0}
    ratio = difference.exp()
    return {
        "mismatch/kl": float((ratio - 1.0 - difference).mean()),
        "mismatch/ratio_mean": float(ratio.mean()),
        "mismatch/ratio_max": float(ratio.max()),
    }
