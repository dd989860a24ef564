"""AdamW on a model's trainable weights; for bfloat16 weights on fp32 copies of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mosaic_fast.config import OptimConfig
from mosaic_fast.errors import TrainingError

State = dict[str, object]


class Optimizer:
    """Clip, check, step.

    A bfloat16 weight has 8 bits of precision: most updates would round to nothing. With `master_weights` its
    fp32 copy is what AdamW changes, and the model holds the copy rounded. Gradients are added up in fp32 as
    backward makes them, so micro-batches do not round either.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self._config = config
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self._masters: dict[int, Tensor] = {}  # index among the weights -> fp32 copy
        for index, weight in enumerate(self.weights):
            if config.master_weights and weight.dtype == torch.bfloat16:
                self._masters[index] = master = weight.detach().float().requires_grad_()
                weight.register_post_accumulate_grad_hook(_adding_to(master))
        self._targets = [self._masters.get(index, weight) for index, weight in enumerate(self.weights)]
        self.adamw = torch.optim.AdamW(
            self._targets,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, rate: float, step: int) -> float:
        """One update at a learning rate; returns the gradient's norm before clipping.

        Weights that nothing reached have a gradient of zero, as they have in a batch that is not pruned.
        TrainingError naming the training step where the gradient, or a weight after it, is not finite; the
        weights are not changed in the first case.
        """
        for target in self._targets:
            if target.grad is None:
                target.grad = torch.zeros_like(target)
        norm = float(nn.utils.clip_grad_norm_(self._targets, self._config.grad_clip))
        if not math.isfinite(norm):
            self.adamw.zero_grad()
            raise TrainingError(
                f"the gradient of step {step} is not finite (norm {norm}); the last checkpoint is intact. "
                "Lower optim.lr or optim.grad_clip, raise loss.kl_weight, or look at the step's trajectories"
            )
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad()
        self._round()
        if not all(bool(torch.isfinite(weight).all()) for weight in self.weights):
            raise TrainingError(
                f"the weights are not finite after step {step}; the last checkpoint is intact. Lower optim.lr"
            )
        return norm

    def state_dict(self) -> State:
        """What a checkpoint keeps beside the model's weights."""
        return {
            "adamw": self.adamw.state_dict(),
            "masters": {i: m.detach() for i, m in self._masters.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Put a state back, fp32 copies included."""
        adamw, masters = state["adamw"], state["masters"]
        assert isinstance(adamw, dict)
        assert isinstance(masters, dict)
        if masters.keys() != self._masters.keys():
            raise TrainingError(
                "the checkpoint's fp32 weights are not those of this model: model.dtype, model.lora_rank and "
                "optim.master_weights must be those of the run"
            )
        self.adamw.load_state_dict(adamw)
        with torch.no_grad():
            for index, master in self._masters.items():
                master.copy_(masters[index])
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for index, master in self._masters.items():
            self.weights[index].copy_(master)


def _adding_to(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that moves a weight's gradient, once it is complete, into its copy's."""

    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    return add
