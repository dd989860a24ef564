"""Recurrent layers and short convolutions on a forest: a child begins with the state its parent ended in.

Such a layer is the family's own: its forward runs as it is, on all nodes in one row, with its own weights and
submodules. Of its code two kinds of functions mix positions: the causal convolution, and the recurrence over
a whole sequence. In this call alone they are others, which take the row apart, call the family's functions
for the parts, and put the results together again. No class, module or global name is changed.

Convolution: each segment of the forest (`segments.py`) stands in one row behind the few tokens before it.
Recurrence: level by level, from the states of the level above. A padded place changes no state.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mosaic_fast.errors import UserError
from mosaic_fast.policy.attention import TreeForward
from mosaic_fast.policy.segments import Batch


@dataclass(frozen=True)
class _Recurrence:
    """How a function of transformers that runs a recurrence over whole sequences is called."""

    sequences: tuple[str, ...]  # its arguments [B, L, ...]
    still: tuple[str, ...]  # those of them that are 0 where a token leaves the state as it is
    initial: str  # the argument that is a state [B, ...]
    final: str  # the argument that asks for the last state
    always_pair: bool = True  # whether it gives a pair even where no state is asked for


_DELTA = _Recurrence(
    ("query", "key", "value", "g", "beta"), ("g", "beta"), "initial_state", "output_final_state"
)
_RECURRENCES = {
    "torch_chunk_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "mamba2_chunk_scan": _Recurrence(
        ("hidden_states", "dt", "B", "C"), ("dt",), "initial_states", "return_final_states", False
    ),
}
_CONVOLUTION, _FUSED = "causal_conv1d_fn", "mamba2_split_conv1d_scan_combined"


@functools.cache
def _mixing_functions(kind: type[nn.Module]) -> frozenset[str]:
    """The functions that mix positions, of those known here, that a class of modules calls by their names."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return frozenset(code.co_names if code else ()) & {*_RECURRENCES, _CONVOLUTION, _FUSED}


def recurrent_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that mix positions by these, unless somebody replaced their forward."""
    return [m for m in model.modules() if "forward" not in vars(m) and _mixing_functions(type(m))]


def read_by_kernels(model: nn.Module) -> set[nn.Module]:
    """Projections whose weights a family's fused kernel reads without calling them."""
    fused = [module for module in model.modules() if _FUSED in _mixing_functions(type(module))]
    return {cast(nn.Module, module.out_proj) for module in fused}


@contextmanager
def on_forest(modules: list[nn.Module]) -> Iterator[None]:
    """Let the recurrent modules of a model run on the forest that the keyword `tree` brings."""
    changed = [module for module in modules if "forward" not in vars(module)]
    try:
        for module in changed:
            vars(module)["forward"] = partial(_run, module)
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _run(module: nn.Module, *args: object, tree: TreeForward | None = None, **kwargs: object) -> object:
    """A recurrent module's own forward, on the nodes of a forest [1, U, D]."""
    if tree is None:
        raise UserError(
            "it mixes positions outside attention, and is not handed the forest that it is run on"
        )
    stock = inspect.unwrap(type(module).forward)
    layer = _Layer(tree, cast(int, module.layer_idx))
    names = {
        name: layer.instead_of(name, stock.__globals__[name]) for name in _mixing_functions(type(module))
    }
    forward = FunctionType(
        stock.__code__, {**stock.__globals__, **names}, stock.__name__, stock.__defaults__, stock.__closure__
    )
    forward.__kwdefaults__ = stock.__kwdefaults__
    out = forward(module, *args, **kwargs)
    layer.finish()
    return out


class _Layer:
    """One layer in one forward: what it takes over from the nodes above, and what it leaves to those below.

    Both are in the order in which the layer's code calls its functions: (inputs of a convolution [1, C, K-1],
    state of a recurrence [1, ...]), each where there is one.
    """

    def __init__(self, tree: TreeForward, layer: int) -> None:
        self._tree, self._layer = tree, layer
        self._segments = tree.forest.segments
        self._above = iter(tree.held[-1]["states", layer]) if tree.held else None
        self._left: list[Tensor] = []

    def instead_of(self, name: str, stock: Callable[..., Any]) -> Callable[..., object]:
        if name in _RECURRENCES:
            return partial(self._recur, stock, _RECURRENCES[name])
        return partial(self._convolve, stock) if name == _CONVOLUTION else _not_fused

    def finish(self) -> None:
        """Note that the layer has run, and keep what it leaves where that is asked for."""
        self._tree.attended.add(self._layer)
        self._tree.keep(("states", self._layer), tuple(self._left))

    def _convolve(
        self,
        stock: Callable[..., Tensor],
        hidden: Tensor,  # [1, C, U]
        weight: Tensor,  # [C, K]
        bias: Tensor | None = None,
        activation: str | None = None,
        **unused: object,
    ) -> Tensor:  # [1, C, U]
        reach = weight.shape[-1] - 1
        before = hidden.new_zeros(1, hidden.shape[1], reach) if self._above is None else next(self._above)
        columns = torch.cat([before, hidden], dim=2)
        self._left.append(columns[:, :, columns.shape[2] - reach :])  # what is kept is a chain: one segment
        row, places = self._tree.forest.context(reach)
        out = stock(columns.index_select(2, row), weight, bias, activation=activation)
        return out.index_select(2, places)

    def _recur(
        self, stock: Callable[..., object], how: _Recurrence, *args: object, **kwargs: object
    ) -> Tensor | tuple[Tensor, None]:
        bound = inspect.signature(stock).bind(*args, **kwargs)
        bound.apply_defaults()
        values = {name: value for name, value in bound.arguments.items() if name != "kwargs"}
        if "dt_softplus" in values:
            values |= _time_steps(values)
        rows = {name: self._dealt(cast(Tensor, values[name]), name in how.still) for name in how.sequences}
        chunk = cast(int, values["chunk_size"])
        on_cpu = rows[how.sequences[0]].device.type == "cpu"
        sizes = [batch.rows * batch.length for level in self._segments.levels for batch in level]
        parts = {name: iter(x.split(sizes)) for name, x in rows.items()}
        states = None if self._above is None else next(self._above)
        outs: list[Tensor] = []
        for level in self._segments.levels:
            finals: list[Tensor] = []
            for batch in level:
                values |= {name: next(part).unflatten(0, (batch.rows, -1)) for name, part in parts.items()}
                values |= {how.initial: _initial(states, batch), how.final: True}
                if on_cpu:  # there a whole chunk is computed, however little is in it
                    values["chunk_size"] = min(chunk, 1 << (batch.length - 1).bit_length())
                out, final = cast(tuple[Tensor, Tensor], stock(**values))
                outs.append(out.flatten(0, 1))
                finals.append(final)
            states = torch.cat(finals)
        assert states is not None
        self._left.append(states)  # what is kept is a chain: one segment
        result = torch.cat(outs).index_select(0, self._segments.places)[None]
        return (result, None) if how.always_pair else result

    def _dealt(self, x: Tensor, still: bool) -> Tensor:  # [1, U, ...] -> [P, ...]
        dealt, padded = x[0].index_select(0, self._segments.order), self._segments.padded
        if padded is None or not still:
            return dealt
        return dealt.masked_fill(padded.view(-1, *[1] * (dealt.ndim - 1)), 0.0)


def _initial(states: Tensor | None, batch: Batch) -> Tensor | None:  # [rows, ...]
    """States that a batch begins with. states: of the level above, or one of the nodes above the forest."""
    if states is None:
        return None
    if batch.above is None:
        return states.expand(batch.rows, *states.shape[1:])
    return states.index_select(0, batch.above)


def _time_steps(values: dict[str, object]) -> dict[str, object]:
    """Mamba 2's time steps, made before they are dealt out, so that a padded place can have one of 0."""
    dt, bias = cast(Tensor, values["dt"]), cast("Tensor | None", values["dt_bias"])
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if values["dt_softplus"]:
        dt = softplus(dt)
    low, high = cast(tuple[float, float], values["dt_limit"])
    return {"dt": dt.clamp(low, high), "dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, torch.inf)}


def _not_fused(*args: object, **kwargs: object) -> None:
    """No kernel for convolution, recurrence and projection at once: the layer then calls them one by one."""
