"""A rank's part of a weight, and the whole of what is spread as a weight is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(weight: Tensor) -> Tensor:
    """The rank's rows of a weight, without gradient, in the weight's own memory; all of one not sharded."""
    own = weight.detach()
    return own.to_local() if isinstance(own, DTensor) else own


def local_rows(weight: Tensor) -> tuple[int, int | None]:
    """Which rows [start, stop) of the whole weight are the rank's; (0, None) for all of one not sharded.

    FSDP2 cuts the first dimension as torch.chunk does: 5 rows on 3 ranks are 2, 2 and 1.
    """
    if not isinstance(weight, DTensor):
        return 0, None
    rows, mesh = weight.shape[0], weight.device_mesh
    chunk = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * chunk, rows)
    return start, min(start + chunk, rows)


def whole(local: Tensor, weight: Tensor) -> Tensor:
    """All rows of what is spread as `weight` is. A collective where it is sharded."""
    if not isinstance(weight, DTensor):
        return local
    spread = DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=torch.Size(weight.shape),
        stride=weight.stride(),
    )
    return spread.full_tensor()


def local_gradient(weight: Tensor) -> Tensor | None:
    """The rank's rows of a weight's gradient, and the weight lets go of it; None if there is none."""
    grad, weight.grad = weight.grad, None
    return grad.to_local() if isinstance(grad, DTensor) else grad
