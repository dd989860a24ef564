"""The plan of a forest, made once for all layers and passes."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mosaic_kernels.attention.plan.build import build_plan
from mosaic_kernels.attention.plan.parts import Plan

PLANS_OF_A_FOREST = 8  # kept: all nodes or some of them, with each window of the model's layers


def plan_for(
    subtree_end: torch.Tensor,
    positions: torch.Tensor | None,
    window: int | None,
    queries: torch.Tensor | None = None,
) -> Plan:
    """The plan of a forest, made once for all layers and passes.

    It lives as long as the tensor `subtree_end` does; calls that make a new tensor each time find the plans
    of the last few forests by their content. A window that no path exceeds changes nothing, and is dropped.
    """
    if window is None or positions is None or not positions.numel() or int(positions.max()) < window:
        positions = window = None
    arrays = (subtree_end, positions, queries)
    contents = (None if x is None else x.numpy().tobytes() for x in arrays)
    if any(x is not None and x.is_inference() for x in arrays):  # such a tensor does not count its changes
        return _cached_plan(*contents, window)
    versions = tuple(None if x is None else x._version for x in arrays)
    known = _PLANS.setdefault(subtree_end, [])
    for one in known:
        same = one.positions is positions and one.queries is queries and one.window == window
        if same and one.versions == versions:
            return one.plan
    plan = _cached_plan(*contents, window)
    known.append(_Known(versions, positions, queries, window, plan))
    del known[:-PLANS_OF_A_FOREST]
    return plan


@dataclass(frozen=True, eq=False)
class _Known:
    """A plan and the tensors it was made for, which are compared by identity and version."""

    versions: tuple[int | None, ...]
    positions: torch.Tensor | None
    queries: torch.Tensor | None
    window: int | None
    plan: Plan


_PLANS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # subtree_end -> list[_Known]


@functools.lru_cache(maxsize=8)
def _cached_plan(
    subtree_end: bytes, positions: bytes | None, queries: bytes | None, window: int | None
) -> Plan:
    end, depth, rows = (
        None if x is None else np.frombuffer(x, np.int64) for x in (subtree_end, positions, queries)
    )
    assert end is not None
    return build_plan(end, depth, window, rows)
