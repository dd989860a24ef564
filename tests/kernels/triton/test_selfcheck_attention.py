"""The self-check before first use: it passes here, and stops a kernel that is off."""

import pytest
import torch

from mosaic_kernels import tree_attention
from mosaic_kernels.attention import triton as triton_attention
from mosaic_kernels.attention.blocks import Tree
from mosaic_kernels.attention.reference import reference_tree_attention
from mosaic_kernels.attention.triton import Variant
from mosaic_kernels.selfcheck import KernelMismatch, run_check
from tests.kernels.triton.machine import machine


@pytest.mark.parametrize("bent", [False, True])
def test_passes(bent: bool) -> None:
    """On a device in every precision. Emulated, which is slow: in one with everything, in another without."""
    dtypes = machine().dtypes if machine().name == "device" else (machine().dtypes[bent],)
    for dtype in dtypes:
        variant = Variant(
            dtype, "ieee", 32, group=2 if bent else 1, limit=bent,
            value_dim=16 if bent else 32, softcap=bent, sinks=bent,
        )  # fmt: skip
        found = triton_attention.deviations(machine().device, variant)
        assert set(found) == {"out", "dq", "dk", "dv", *(["dsinks"] if bent else [])}
        assert all(0 < one.error <= one.limit for one in found.values())


def test_what_is_checked_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[object] = []
    monkeypatch.setattr(triton_attention, "check_once", lambda *args: checked.append(args[2]))
    q, k = torch.randn(3, 6, 32, device=machine().device), torch.randn(3, 2, 32, device=machine().device)
    positions = torch.arange(3)
    tree_attention(q, k, k, torch.tensor([3, 3, 3]), positions=positions, window=2, backend="triton")
    assert checked == [Variant(torch.float32, "ieee", 32, group=3, limit=True, value_dim=32)]


@pytest.mark.parametrize("calls", [(1.001, 1.001), (float("nan"),)])
def test_refuses_a_kernel_that_is_off(calls: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is plain PyTorch here, which is quicker than an emulated one, times a factor."""
    for factor in calls:  # a failure is not remembered as a pass

        def off(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: Tree, scale: float, tiles: object,
            softcap: object, sinks: object, factor: float = factor,
        ) -> torch.Tensor:  # fmt: skip
            end = tree.end.long()
            exact = reference_tree_attention(q, k, v, end, positions=None, window=None, scale=scale)
            return exact * factor

        monkeypatch.setattr(triton_attention, "attend", off)
        with pytest.raises(KernelMismatch, match=r"tree_attention.*fails its self-check.*out.*reference"):
            run_check(
                "tree_attention",
                machine().device,
                Variant(torch.float32, "ieee", 32, group=1, limit=False, value_dim=32),
                triton_attention.deviations,
            )
