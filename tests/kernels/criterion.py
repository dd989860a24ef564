"""What the kernel tests assert of errors."""

from collections.abc import Iterable

from mosaic_kernels.rounding import Worst


def assert_right(names: Iterable[str], results: Iterable[Worst]) -> None:
    """No element is farther off than rounding explains; the worst index is printed."""
    off = {name: x for name, x in zip(names, results, strict=True) if not x.share <= 1}
    assert not off, "; ".join(f"{name} is off by {x}" for name, x in off.items())
