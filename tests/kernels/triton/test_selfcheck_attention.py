"""The self-check before first use: it passes here, and stops a kernel that is off."""

import pytest
import torch

from mosaic_kernels.attention import triton as triton_attention
from mosaic_kernels.proof.selfcheck import KernelMismatch, run_check
from tests.kernels.triton.machine import machine


@pytest.mark.parametrize("windowed", [False, True])
def test_passes(windowed: bool) -> None:
    for dtype in machine().dtypes:
        found = triton_attention.deviations(machine().device, (dtype, 32, windowed, "ieee"))
        assert set(found) == {"out", "dq", "dk", "dv"}
        assert all(0 < one.error <= one.limit for one in found.values())


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_refuses_a_kernel_that_is_off(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = triton_attention.attend

    def off(*args: torch.Tensor, **options: object) -> torch.Tensor:
        return exact(*args, **options) * factor  # pyrefly: ignore [bad-argument-type]

    monkeypatch.setattr(triton_attention, "attend", off)
    for _ in range(2):  # a failure is not remembered as a pass
        with pytest.raises(KernelMismatch, match=r"tree_attention.*fails its self-check.*out.*reference"):
            run_check(
                "tree_attention",
                machine().device,
                (torch.float32, 32, False, "ieee"),
                triton_attention.deviations,
            )
