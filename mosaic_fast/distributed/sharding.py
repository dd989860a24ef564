"""Weights, gradients and optimiser state spread over the ranks by torch's FSDP2.

`fully_shard` gathers a module's weights when the module is called, and frees them after it. Policy calls a
model's parts, of the last layer even the projections, so what is sharded are small modules of our own: one
around each layer, whose call is what Policy does with the layer, and a root that holds these and the rest of
the model, whose call is the whole forward. A model whose layers cannot be called one by one is one module,
gathered as a whole. The model's own modules stay as they are, without hooks: with everything gathered they
are an ordinary model, which an engine may use or a file be written from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from mosaic_fast.distributed.world import World
from mosaic_fast.errors import UserError
from mosaic_fast.policy import Policy
from mosaic_fast.policy.attention import TreeForward
from mosaic_fast.policy.forward import (
    WAYS,
    Arguments,
    ForwardInParts,
    LayerCall,
    Way,
    layer_calls,
    run_in_parts,
    run_model,
)
from mosaic_fast.policy.layout import decoder_of, has_hooks, has_stock_forward


class Sharding:
    """A policy's weights over the ranks of a world. With one rank nothing is changed, and nothing costs.

    The gradient of a weight is the sum over the ranks, in fp32 or wider, and each rank holds its own rows of
    weight, gradient and optimiser state.
    """

    def __init__(
        self, policy: Policy, world: World, device: torch.device, *, master_weights: bool = False
    ) -> None:
        """Shard in place.

        master_weights: trainable bfloat16 weights are kept in fp32 and gathered in bfloat16, which is the
            rounding that `Optimizer` does in one process.
        UserError for a model that cannot be called part by part.
        """
        self.masters = False  # whether the sharded weights are fp32 copies of bfloat16 ones
        self._units: list[FSDPModule] = []
        self._adds_up = False  # gradients of micro-batches, before they are spread
        if world.size == 1:
            return
        model = policy.model
        if not has_stock_forward(model) or has_hooks(model.get_decoder()):
            raise UserError(
                f"{type(model).__name__} has hooks or a forward of its own: several ranks run models as "
                "transformers has them; remove the hooks, or train in one process"
            )
        way = WAYS[world.maximum(WAYS.index(policy.admission.way))]  # rounding may differ between machines
        trained = [p for p in model.parameters() if p.requires_grad]
        self.masters = master_weights and bool(trained) and all(p.dtype == torch.bfloat16 for p in trained)
        if self.masters:
            for weight in trained:
                weight.data = weight.data.float()
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.masters else None,
            reduce_dtype=torch.float32 if model.dtype != torch.float64 else None,
            cast_forward_inputs=False,
        )
        mesh = world.mesh(device)
        layers: list[_Layer] = []
        if way in ("parts", "layers"):
            calls = zip(layer_calls(model, way), decoder_of(model).layers, strict=True)
            layers = [_Layer(call, layer) for call, layer in calls]
        root: nn.Module = _Root(model, layers) if layers else _Whole(model, way)
        for unit in (*layers, root):
            fully_shard(unit, mesh=mesh, mp_policy=precision)
            self._units.append(cast(FSDPModule, unit))
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)  # the sum: the loss is normalised by the global count
            unit.set_force_sum_reduction_for_comms(True)
        numbers = sum(p.numel() for p in trained)
        self._adds_up = not world.maximum(int(FLOAT32 * numbers > ROOM_FRAC * _memory_of(device)))
        policy.forward_in_parts = cast(ForwardInParts, root)
        with self.gathered():  # whether a weight is trained is settled when it is first gathered
            pass

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While entered the model holds its whole weights, on every rank. Every rank has to enter."""
        for unit in self._units:
            unit.unshard()
        try:
            yield
        finally:
            self.reshard()

    @contextmanager
    def no_backward(self) -> Iterator[None]:
        """Around forwards that no backward pass follows, which would leave the root gathered."""
        try:
            yield
        finally:
            self.reshard()

    def scatter_gradients(self, now: bool) -> None:
        """Whether the coming backward pass spreads gradients over the ranks, or adds them up for a later one.

        Added up they are whole on each rank, in fp32 or wider: where a GPU has no room for that, each pass
        spreads its own.
        """
        for unit in self._units:
            unit.set_requires_gradient_sync(now or not self._adds_up, recurse=False)

    def reshard(self) -> None:
        """Free the whole weights wherever they are gathered."""
        for unit in self._units:
            unit.reshard()


FLOAT32 = 4  # bytes
ROOM_FRAC = 0.2
"""Share of a GPU's memory that whole gradients may take until the last micro-batch."""


def _memory_of(device: torch.device) -> float:
    """Bytes of the device's memory; a CPU has enough."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


class _Layer(nn.Module):
    """One call that does with a layer what Policy does with it."""

    def __init__(self, call: LayerCall, layer: nn.Module) -> None:
        super().__init__()
        self._call, self.layer = call, layer

    def forward(self, hidden: Tensor, tree: TreeForward, arguments: Arguments) -> Tensor:
        return self._call(hidden, tree, arguments)


class _Root(nn.Module):
    """The whole forward as one call: a `ForwardInParts`."""

    def __init__(self, model: PreTrainedModel, layers: list[_Layer]) -> None:
        super().__init__()
        decoder = decoder_of(model)
        vars(self)["model"] = model  # not a submodule: its layers would be found a second time
        self.embed_tokens, self.rotary_emb = decoder.embed_tokens, decoder.rotary_emb
        self.layers = nn.ModuleList(layers)
        self.norm, self.lm_head = decoder.norm, model.lm_head

    def forward(
        self, tree: TreeForward, longest_alone: int, temperature: float, return_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        calls = [cast(LayerCall, layer) for layer in self.layers]
        return run_in_parts(vars(self)["model"], calls, tree, longest_alone, temperature, return_entropy)


class _Whole(nn.Module):
    """The forward of a model whose layers cannot be called one by one: gathered as a whole for its time."""

    def __init__(self, model: PreTrainedModel, way: Way) -> None:
        super().__init__()
        self.model, self._way = model, way

    def forward(
        self, tree: TreeForward, longest_alone: int, temperature: float, return_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        return run_model(self.model, self._way, tree, longest_alone, temperature, return_entropy)


def local_part(weight: Tensor) -> Tensor:
    """The rank's rows of a weight, without gradient, in the weight's own memory; all of one not sharded."""
    own = weight.detach()
    return own.to_local() if isinstance(own, DTensor) else own


def local_rows(weight: Tensor) -> tuple[int, int | None]:
    """Which rows [start, stop) of the whole weight are the rank's; (0, None) for all of one not sharded.

    FSDP2 cuts the first dimension as torch.chunk does: 5 rows on 3 ranks are 2, 2 and 1.
    """
    if not isinstance(weight, DTensor):
        return 0, None
    rows, mesh = weight.shape[0], weight.device_mesh
    chunk = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * chunk, rows)
    return start, min(start + chunk, rows)


def whole(local: Tensor, weight: Tensor) -> Tensor:
    """All rows of a tensor that is spread over ranks as `weight` is. A collective where that is sharded."""
    if not isinstance(weight, DTensor):
        return local
    spread = DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=torch.Size(weight.shape),
        stride=weight.stride(),
    )
    return spread.full_tensor()


def local_gradient(weight: Tensor) -> Tensor | None:
    """Take the rank's rows of a weight's gradient away from the weight; None if it has none."""
    grad, weight.grad = weight.grad, None
    return grad.to_local() if isinstance(grad, DTensor) else grad
