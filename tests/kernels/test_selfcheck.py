"""The self-check's verdict, and that its surroundings do not reach it."""

from collections.abc import Hashable, Mapping

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mosaic_kernels.selfcheck import Deviation, KernelMismatch, check_once, deviations_of, run_check

CPU = torch.device("cpu")


def differentiates(device: torch.device, variant: Hashable) -> Mapping[str, Deviation]:
    """A check as the ops have them: it builds a graph and walks it."""
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad((x @ x) * x.exp().sum(), x)
    assert grad.dtype == torch.float32
    return {"dx": Deviation(0.0, 1.0)}


def test_runs_inside_checkpointing_autocast_and_inference_mode() -> None:
    """Checkpointing counts the tensors saved in its forward, and recomputes when one is read."""

    def layer(x: torch.Tensor) -> torch.Tensor:
        run_check("op", CPU, "checkpointed", differentiates)  # runs in the forward, not in the recomputation
        return x.sin().cos()

    x = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, -x.sin().sin() * x.cos())
    with torch.inference_mode():
        run_check("op", CPU, "inference", differentiates)


@pytest.mark.parametrize("error", [1.1, float("nan"), float("inf")])
def test_refuses_and_names_what_is_off(error: float) -> None:
    def check(device: torch.device, variant: Hashable) -> Mapping[str, Deviation]:
        return {"out": Deviation(0.5, 1.0), "dq": Deviation(error, 1.0)}

    for _ in range(2):  # a failure is not remembered as a pass
        with pytest.raises(KernelMismatch, match=r"op: .*bf16.* fails its self-check on cpu: dq off"):
            run_check("op", CPU, "bf16", check)


def test_passes_once() -> None:
    calls = []

    def check(device: torch.device, variant: Hashable) -> Mapping[str, Deviation]:
        calls.append(variant)
        return {"out": Deviation(0.0, 1.0)}

    for variant in ("a", "a", "b"):
        run_check("op", CPU, variant, check)
    assert calls == ["a", "b"]
    check_once("op", CPU, "c", check)
    assert calls == ["a", "b"], "nothing is checked outside CUDA"


def test_the_criterion() -> None:
    """Twice plain's error and a floor; for gradients three times, relative to the largest gradient."""
    exact = {"out": torch.tensor([10.0]), "dq": torch.tensor([0.0]), "dk": torch.tensor([100.0])}
    plain = {"out": torch.tensor([10.1]), "dq": torch.tensor([0.0]), "dk": torch.tensor([101.0])}
    ours = {"out": torch.tensor([10.3]), "dq": torch.tensor([1e-5]), "dk": torch.tensor([float("nan")])}
    found = deviations_of(ours, plain, exact, torch.float32)
    assert found["out"].error == pytest.approx(0.03, rel=1e-4)
    assert found["out"].limit == pytest.approx(0.02 + 1e-6, rel=1e-4)
    assert found["dq"].error == pytest.approx(1e-7)
    assert found["dq"].limit == pytest.approx(1e-6)
    assert found["dk"].error == float("inf")
    assert found["dk"].limit == pytest.approx(0.03, rel=1e-3)
