"""The cases for CUDA, in tiny, on a device that is not the CPU; test_device.py runs it in its own process.

Tensors of the device `elsewhere` hold a tensor on the CPU that computes their values. As on CUDA, an operator
on one of them and one of the CPU's (other than a single number, or a copy between both) is an error, so what
a case forgets to move shows here.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
_setup_privateuseone_for_python_backend("elsewhere")
ELSEWHERE = torch.device("elsewhere", 0)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Moved(Tensor):
    """A tensor of the other device."""

    inner: Tensor  # pyrefly: ignore [bad-override-mutable-attribute]

    @staticmethod
    def __new__(cls, inner: Tensor) -> Moved:
        made = Tensor._make_wrapper_subclass(  # pyrefly: ignore
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=ELSEWHERE, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:  # pyrefly: ignore
        return f"elsewhere: {self.inner}"

    def tolist(self) -> object:  # pyrefly: ignore [bad-override]
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore
        cls,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        return _computed(func, args, kwargs or {})


class Factories(TorchDispatchMode):
    """What makes tensors on the other device has none among its arguments."""

    def __torch_dispatch__(  # pyrefly: ignore
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        return _computed(func, args, kwargs or {})


def _computed(func: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    flat = tree_flatten((args, kwargs))[0]
    there = any(isinstance(x, Moved) for x in flat)
    strangers = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, Moved) and x.dim()]
    if there and strangers and func not in COPIES:
        raise RuntimeError(
            f"{func}: tensors of two devices: {[tuple(x.shape) for x in strangers]} on the CPU"
        )
    device = kwargs.get("device")
    asked = device is not None and torch.device(str(device)).type == ELSEWHERE.type
    plain = {**kwargs, "device": torch.device("cpu")} if asked else dict(kwargs)
    out = func(*tree_map(_inner, list(args)), **tree_map(_inner, plain))
    if device is not None:
        moves = asked
    elif func in COPIES:
        moves = isinstance(args[0], Moved)
    else:
        moves = there
    if not moves:
        return out
    wrapped = tree_map(lambda x: Moved(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, tuple(args), dict(kwargs), wrapped) if there else wrapped


def _inner(x: object) -> object:
    return x.inner if isinstance(x, Moved) else x


import contenders  # noqa: E402
import measure  # noqa: E402
from agreement import Missing  # noqa: E402
from cases import attention, logprob, preference, scaling, step  # noqa: E402
from device import Place  # noqa: E402
from measure import Result  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from workloads import Shape, groups_drawn, real_qwen3  # noqa: E402


@dataclass(frozen=True)
class Elsewhere(Place):
    """Random numbers are drawn on the CPU: the device has no generator."""

    def randn(self, *shape: int, seed: int) -> Tensor:
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device, self.dtype)

    def randint(self, below: int, count: int, *, seed: int) -> Tensor:
        return torch.randint(below, (count,), generator=torch.Generator().manual_seed(seed)).to(self.device)


TINY = Shape(64, 128, layers=2, heads=4, key_heads=2, head_size=16, vocabulary=128)


def _model(place: Place, shape: Shape = TINY) -> PreTrainedModel:
    """Made on the CPU and moved: this device knows no torch.tensor(list)."""
    here = real_qwen3(Place(torch.device("cpu"), place.dtype, real=True), TINY)
    return here.to(place.device)  # pyrefly: ignore


def main() -> None:
    place = Elsewhere(ELSEWHERE, torch.bfloat16, real=True)
    attention.REAL_HEADS = (4, 2, 16)
    attention.REAL_SHAPES["attention"] = (40, 4, 20, True)
    logprob.REAL_SHAPES["logprob"] = (70, 32, 200)
    preference.REAL_HEAD = (32, 200)
    for name in preference.REAL_SHAPES:
        preference.REAL_SHAPES[name] = (20, 4, 12)
    step.REAL_WORKLOADS["step"] = lambda model: groups_drawn(model, 2, 12, 3, 6)
    scaling._ROLLOUTS = 4
    scaling.REAL_LENGTHS["sharing"] = 20
    step.real_qwen3 = scaling.real_qwen3 = preference.real_qwen3 = _model  # pyrefly: ignore
    # Recomputing asks the device for the state of its generator.
    contenders.checkpoint_activations = lambda model: None  # pyrefly: ignore
    for case in (attention, logprob, preference, step, scaling):  # nothing is timed here
        case.compare = lambda works, repeats, *args, **options: measure.compare(works, 1, *args, **options)
    with Factories():
        with pytest.raises(RuntimeError, match="two devices"):
            torch.ones(2, device=ELSEWHERE) + torch.ones(2)
        for name, case in {
            "attention": attention,
            "logprob": logprob,
            "preference": preference,
            "preference:step": preference,
            "step": step,
            "scaling:sharing-60": scaling,
        }.items():
            missing: Missing = case.check(name, True, place)
            found: Result = case.run(name, True, place, missing)
            assert {"ours", "flat"} <= set(found.contenders), found.contenders
            print(name, ", ".join(found.contenders), "|", missing)


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except Exception:  # noqa: BLE001  (printed, and the status says so)
        traceback.print_exc()
    # Autograd has a thread for this device, and aborts the process when that meets an interpreter that ends.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
