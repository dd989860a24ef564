"""What the kernel tests assert of errors."""

from collections.abc import Iterable

import torch

from mosaic_kernels.rounding import Worst


def assert_right(names: Iterable[str], results: Iterable[Worst]) -> None:
    """No element is farther off than rounding explains; the worst index is printed."""
    off = {name: x for name, x in zip(names, results, strict=True) if not x.share <= 1}
    assert not off, "; ".join(f"{name} is off by {x}" for name, x in off.items())


def relative_error(value: torch.Tensor, expected: torch.Tensor, floor: float = 1e-3) -> float:
    """|value - expected| / max(|expected|, floor) in the 2-norm; inf where value is not finite."""
    value, expected = value.detach().double(), expected.detach().double()
    if value.shape != expected.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    return float((value - expected).norm()) / max(float(expected.norm()), floor)
