"""AdamW on a model's trainable weights; for bfloat16 weights on fp32 copies of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mosaic_fast.distributed import ALONE, World
from mosaic_fast.distributed.sharding import local_gradient, local_part, local_rows, whole
from mosaic_fast.errors import TrainingError
from mosaic_fast.learner.tensor_file import Entry, Reader

if TYPE_CHECKING:
    from mosaic_fast.config import OptimConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW with clipping and checks: a step is taken only where gradients and weights are finite.

    A bfloat16 weight has 8 bits of precision: most updates would round to nothing. With `master_weights` its
    fp32 copy is what AdamW changes, and the model holds the copy rounded. Gradients are added up in fp32 as
    backward makes them, so micro-batches do not round either.

    Of weights that are sharded over ranks each rank updates its own rows; the sharded weights of a bfloat16
    model are its fp32 copies themselves (see `Sharding`).
    """

    def __init__(
        self, model: nn.Module, config: OptimConfig, world: World = ALONE, *, sharded_masters: bool = False
    ) -> None:
        """sharded_masters: the model's sharded weights are fp32 copies of bfloat16 ones."""
        self._config, self._world, self._sharded_masters = config, world, sharded_masters
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names, self.weights = list(named), list(named.values())
        self._masters: dict[int, Tensor] = {}  # index among the weights -> fp32 copy
        self._targets: list[Tensor] = []  # what AdamW changes
        for index, weight in enumerate(self.weights):
            if isinstance(weight, DTensor):
                self._targets.append(local_part(weight).requires_grad_())
            elif config.master_weights and weight.dtype == torch.bfloat16:
                self._masters[index] = master = weight.detach().float().requires_grad_()
                weight.register_post_accumulate_grad_hook(_adding_to(master))
                self._targets.append(master)
            else:
                self._targets.append(weight)
        spared = spared_from_decay(model)
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": config.weight_decay},
            {"params": [], "weight_decay": 0.0},
        ]
        for weight, target in zip(self.weights, self._targets, strict=True):
            groups[id(weight) in spared]["params"].append(target)
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            fused=True,
        )

    def step(self, rate: float, step: int) -> float:
        """One update at a learning rate; returns the gradient's norm before clipping.

        step: number of the training step, from 1, for messages.

        Weights that nothing reached have a gradient of zero, as they have in a batch that is not pruned.
        TrainingError naming the training step, counted from 1, where the gradient, or a weight after it, is
        not finite; the weights are not changed in the first case. Every rank sees the same norm, and the same
        error. The device is waited for once, for both.
        """
        for weight, target in zip(self.weights, self._targets, strict=True):
            if target is not weight and isinstance(weight, DTensor):
                target.grad = local_gradient(weight)
            if target.grad is None:
                target.grad = torch.zeros_like(target)
        total = self._norm()
        nn.utils.clip_grads_with_norm_(self._targets, self._config.grad_clip, total)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        # Where this is 1, AdamW leaves weights and averages as they are: nobody has to wait for the norm.
        vars(self.adamw)["found_inf"] = 1.0 - torch.isfinite(total).float()
        self.adamw.step()
        self.adamw.zero_grad()
        self._round()
        norm, largest = torch.stack(
            [total.double(), self._largest_weight().to(total.device).double()]
        ).tolist()
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient of step {step} is not finite (norm {norm}); the last checkpoint is intact. "
                "Lower optim.lr or optim.grad_clip, raise loss.kl_weight, or look at the step's trajectories"
            )
        if self._world.maximum(int(not math.isfinite(largest))):
            raise TrainingError(
                f"the weights are not finite after step {step}; the last checkpoint is intact. Lower optim.lr"
            )
        return norm

    @property
    def updates(self) -> int:
        """How many updates were made so far, those before the run was resumed included."""
        state = self.adamw.state
        return int(state.get(self._targets[0], {}).get("step", 0)) if self._targets else 0

    def entry_names(self) -> set[str]:
        """The names of `entries`."""
        return {entry.name for entry in self.entries()}

    def entries(self) -> list[Entry]:
        """What a checkpoint keeps beside the model's weights, whole: moments and fp32 copies by weight name.

        Making an entry is a collective under several ranks.
        """
        found = []
        for index, (name, weight, target) in enumerate(
            zip(self._names, self.weights, self._targets, strict=True)
        ):
            kept = {key: value for key, value in self.adamw.state[target].items() if key in _MOMENTS}
            if self._has_master(index):
                kept["master"] = target
            shape = tuple(weight.shape)
            for key, value in kept.items():
                found.append(Entry(f"{key}.{name}", shape, value.dtype, partial(whole, value, weight)))
        return found

    @torch.no_grad()
    def load(self, read: Reader, updates: int) -> None:
        """Put back the state that was written after `updates` updates, of however many ranks.

        TrainingError where it belongs to another model or precision.
        """
        kinds = _MOMENTS if updates else ()
        expected = {f"{kind}.{name}" for kind in kinds for name in self._names}
        expected |= {f"master.{name}" for i, name in enumerate(self._names) if self._has_master(i)}
        found = {name for name in read.names if name.partition(".")[0] in (*_MOMENTS, "master")}
        if found != expected:
            different = min(found ^ expected)
            raise TrainingError(
                f"the checkpoint's optimiser state is not that of this model ({different}): model.dtype, "
                "model.lora_rank and optim.master_weights must be those of the run"
            )
        in_groups = [target for group in self.adamw.param_groups for target in group["params"]]
        places = {id(target): place for place, target in enumerate(in_groups)}  # as AdamW numbers them
        states: dict[int, dict[str, Tensor]] = {}
        for index, (name, weight) in enumerate(zip(self._names, self.weights, strict=True)):
            rows = local_rows(weight)
            if self._has_master(index):
                self._targets[index].copy_(read(f"master.{name}", *rows))
            if updates:
                place = places[id(self._targets[index])]
                states[place] = {key: read(f"{key}.{name}", *rows) for key in _MOMENTS}
                states[place]["step"] = torch.tensor(float(updates))
        self.adamw.load_state_dict({**self.adamw.state_dict(), "state": states})
        self._round()

    def _has_master(self, index: int) -> bool:
        return index in self._masters or self._sharded_masters

    def _norm(self) -> Tensor:
        """The 2-norm of the whole gradient. Under several ranks the squares are added up in fp64."""
        own = nn.utils.get_total_norm([target.grad for target in self._targets if target.grad is not None])
        return own if self._world.size == 1 else self._world.sum(own.double() ** 2).sqrt().to(own.dtype)

    def _largest_weight(self) -> Tensor:
        """The largest magnitude among this rank's weights; NaN or inf where one of them is."""
        parts = [part for weight in self.weights if (part := local_part(weight)).numel()]
        return nn.utils.get_total_norm(parts, math.inf)

    @torch.no_grad()
    def _round(self) -> None:
        for index, master in self._masters.items():
            self.weights[index].copy_(master)


def spared_from_decay(model: nn.Module) -> set[int]:
    """The ids of the weights that `weight_decay` leaves alone: norms, biases and embeddings.

    Norms and biases are the weights of one dimension. An LM head that is tied to the embedding is the
    embedding; one of its own is a matrix like the others, and so are both matrices of an adapter.
    """
    spared = {id(weight) for weight in model.parameters() if weight.ndim < 2}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            spared |= {id(weight) for weight in module.parameters(recurse=False)}
    return spared


def _adding_to(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that moves a weight's gradient, once it is complete, into its copy's."""

    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    return add
