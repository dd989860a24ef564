"""Recurrent layers and short convolutions on tokens of many sequences, which share what is before a fork.

A segment of tokens begins with the state that the one above it ended in, in training on a forest as in
prefill and decoding.

Such a layer is the family's own: its forward runs as it is, on all nodes in one row, with its own weights and
submodules. Of its code two kinds of functions mix positions: the causal convolution, and the recurrence over
a whole sequence. In this call alone they are others, which take the row apart, call the family's functions
for the parts, and put the results together again. No class, weight or global name is changed; while a forward
lasts, the attribute `forward` of each such module leads here.

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
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mosaic_rollout.engine.segments import Batch, Segments
from mosaic_rollout.errors import UserError

States = tuple[Tensor, ...]
"""What a layer hands on, in the order in which its code calls its functions: (inputs of a convolution
[.., C, K - 1], state of a recurrence [.., heads, ..]), each where there is one."""


class Handed(Protocol):
    """What a forward brings along for recurrent layers: how its tokens hang together, and their states."""

    @property
    def segments(self) -> Segments: ...

    @property
    def wants_states(self) -> bool:
        """Whether anybody wants to know in which states the segments end."""
        ...

    def begin(self, layer: int) -> States | None:
        """What the first level's segments begin with, one for all or one for each; None: with nothing."""
        ...

    def end(self, layer: int, left: States) -> None:
        """The layer has run; `left` is what each segment ends with, nothing unless `wants_states`."""
        ...


@dataclass(frozen=True)
class _Recurrence:
    """How a function of transformers that runs a recurrence over whole sequences is called."""

    sequences: tuple[str, ...]  # its arguments [B, L, ...]
    neutral: tuple[str, ...]  # those of them that are 0 where a token leaves the state as it is
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
    """Let the recurrent modules of a model run on the segments that the keyword `tree` or `served` brings."""
    changed = [module for module in modules if "forward" not in vars(module)]
    try:
        for module in changed:
            vars(module)["forward"] = partial(_run, module)
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _run(
    module: nn.Module,
    *args: object,
    tree: Handed | None = None,
    served: Handed | None = None,
    **kwargs: object,
) -> object:
    """A recurrent module's own forward, on tokens in a row [1, U, D].

    tree, served: what the trainer's forwards on forests bring along, or the engine's.
    """
    handed = tree or served
    if handed is None:
        raise UserError(
            "it mixes positions outside attention, and is not handed the forest that it is run on"
        )
    stock = inspect.unwrap(type(module).forward)
    layer = _Layer(handed, cast(int, module.layer_idx))
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
    """One layer in one forward: what it takes over from before its tokens, and what it leaves."""

    def __init__(self, handed: Handed, layer: int) -> None:
        self._handed, self._layer, self._segments = handed, layer, handed.segments
        before = handed.begin(layer)
        self._before = None if before is None else iter(before)
        self._left: list[Tensor] = []

    def instead_of(self, name: str, stock: Callable[..., Any]) -> Callable[..., object]:
        if name in _RECURRENCES:
            return partial(self._recur, stock, _RECURRENCES[name])
        return partial(self._convolve, stock) if name == _CONVOLUTION else _not_fused

    def finish(self) -> None:
        self._handed.end(self._layer, tuple(self._left))

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
        before = hidden.new_zeros(1, hidden.shape[1], reach) if self._before is None else next(self._before)
        row, places, last = self._segments.context(reach, len(before))
        columns = torch.cat([before.transpose(0, 1).flatten(1)[None], hidden], dim=2)
        if self._handed.wants_states:
            self._left.append(columns[0, :, last].transpose(0, 1))  # [segments, C, K - 1]
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
        rows = {name: self._dealt(cast(Tensor, values[name]), name in how.neutral) for name in how.sequences}
        chunk = cast(int, values["chunk_size"])
        on_cpu = rows[how.sequences[0]].device.type == "cpu"
        sizes = [batch.rows * batch.length for level in self._segments.levels for batch in level]
        parts = {name: iter(x.split(sizes)) for name, x in rows.items()}
        states = None if self._before is None else next(self._before)
        outs: list[Tensor] = []
        ended: list[Tensor] = []
        for level in self._segments.levels:
            finals: list[Tensor] = []
            for batch in level:
                values |= {name: next(part).unflatten(0, (batch.rows, -1)) for name, part in parts.items()}
                values |= {how.initial: _initial(states, batch), how.final: True}
                if on_cpu:  # there a whole chunk is computed, however little is in it
                    values["chunk_size"] = min(chunk, 1 << (batch.length - 1).bit_length())
                # By place as the layer has it: kernels of other packages call these arguments otherwise.
                by_place = [values[name] for name in list(values)[: len(args)]]
                by_name = {name: values[name] for name in list(values)[len(args) :]}
                out, final = cast(tuple[Tensor, Tensor], stock(*by_place, **by_name))
                outs.append(out.flatten(0, 1))
                finals.append(final)
            states = torch.cat(finals)
            ended.append(states)
        if self._handed.wants_states:
            self._left.append(torch.cat(ended).index_select(0, self._segments.ends))
        result = torch.cat(outs).index_select(0, self._segments.places)[None]
        return (result, None) if how.always_pair else result

    def _dealt(self, x: Tensor, neutral: bool) -> Tensor:  # [1, U, ...] -> [P, ...]
        dealt, padded = x[0].index_select(0, self._segments.order), self._segments.padded
        if padded is None or not neutral:
            return dealt
        return dealt.masked_fill(padded.view(-1, *[1] * (dealt.ndim - 1)), 0.0)


def _initial(states: Tensor | None, batch: Batch) -> Tensor | None:  # [rows, ...]
    """States that a batch begins with. states: of the level above or before the first, or one for all."""
    if states is None:
        return None
    if len(states) == 1:
        return states.expand(batch.rows, *states.shape[1:]).contiguous()
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
