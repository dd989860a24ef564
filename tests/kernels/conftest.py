"""Fixtures of the kernel tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty comes filled with NaN, or the largest integer, for the length of a test."""
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory by default
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
