"""Tree attention: every token of a forest attends to its ancestors and itself."""

from collections.abc import Callable

import torch

from mosaic_kernels.attention.plan import plan_for
from mosaic_kernels.attention.reference import reference_tree_attention
from mosaic_kernels.attention.segments import segments_tree_attention
from mosaic_kernels.attention.tiles import architecture_of, missing_tile
from mosaic_kernels.dispatch import Backends, Defaults, IndexLike, as_index, choose_backend

BACKENDS: Backends = {
    "reference": None,
    "segments": ("cpu",),
    "triton": ("cuda",),
    "flash": ("cuda",),
    "flex": ("cuda",),
}
DEFAULTS: Defaults = {"cpu": ("segments",), "cuda": ("triton", "flex", "reference")}

__all__ = ["BACKENDS", "tree_attention"]


def tree_attention(
    q: torch.Tensor,  # [Uq, Hq, D] rotated queries, in packed (depth-first) order
    k: torch.Tensor,  # [U, Hkv, D] Hkv divides Hq; query head h reads key head h // (Hq // Hkv)
    v: torch.Tensor,  # [U, Hkv, V]
    subtree_end: IndexLike,  # [U] int
    *,
    queries: IndexLike | None = None,  # [Uq] int, rising: packed position of each row of q; None: all, Uq = U
    positions: IndexLike | None = None,  # [U] int, needed with a window or chunk
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [Hq] floating: one more logit a head, whose value is 0
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:  # [Uq, Hq, V] in q's dtype
    """Attention over a packed forest: q sees k iff k <= q < subtree_end[k].

    queries picks the packed positions whose outputs are wanted; every position remains a key.
    With a window, also positions[q] - positions[k] < window, as in transformers' sliding_window; with a
    chunk, also positions[q] // chunk == positions[k] // chunk (Llama 4). scale multiplies the scores; None
    means D ** -0.5. A softcap c bends them to c tanh(score / c) (Gemma 2, arXiv 2408.00118, section 2). A
    sink takes its share of each row's softmax and adds nothing (gpt-oss). Differentiable in q, k, v, sinks.
    Backends: reference (dense mask, any device), segments (CPU: PyTorch's fused kernel over a few large
    pieces of the forest; fp32 and fp64, other dtypes are computed in fp32), triton (CUDA: bf16, fp16, fp32),
    flash (flash-attn's varlen functions on gathered K and V; no sinks), flex (FlexAttention). auto: segments
    on CPU; on CUDA triton, and flex, else the reference, where triton has no tile; fp64 goes to the
    reference there.

    Example: with subtree_end = [4, 4, 3, 4] (rollouts [5, 6, 7] and [5, 6, 8]) node 3 sees 0, 1 and 3.
    """
    _check(q, k, v, sinks)
    num_nodes = k.shape[0]
    end = as_index("subtree_end", subtree_end, q.device, below=num_nodes + 1)
    if end.shape != (num_nodes,):
        raise ValueError(f"subtree_end has shape {tuple(end.shape)}, k has {num_nodes} positions")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 (None for no cap), got {softcap}")
    depth = _depths(positions, window, chunk, k)
    rows = None if queries is None else _as_queries(queries, q, num_nodes)
    if rows is None and q.shape[0] != num_nodes:
        raise ValueError(f"q has {q.shape[0]} rows for {num_nodes} positions: pass queries=")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "auto" and q.dtype == torch.float64 and q.device.type != "cpu":
        backend = "reference"
    chosen = choose_backend(
        "tree_attention", backend, q.device, BACKENDS, DEFAULTS, lambda name: _obstacle(name, q, v)
    )
    if chosen == "segments":
        plan = plan_for(end, depth, window, rows, chunk)
        return segments_tree_attention(q, k, v, plan, scale=scale, softcap=softcap, sinks=sinks)
    attention = _backend(chosen)
    return attention(
        q, k, v, end, positions=depth, window=window, scale=scale, queries=rows,
        chunk=chunk, softcap=softcap, sinks=sinks,
    )  # fmt: skip


def _obstacle(name: str, q: torch.Tensor, v: torch.Tensor) -> str:
    """What keeps a backend from computing heads of these sizes, "" for nothing."""
    if name not in ("triton", "flex"):
        return ""
    arch = architecture_of(q.device)
    if name == "triton":
        return missing_tile(arch, max(q.shape[2], v.shape[2]), q.dtype)
    head_dim = min(q.shape[2], v.shape[2])
    below = arch in ("sm_70", "sm_75") or head_dim < 16
    return f"no kernel for head size {head_dim} on {arch} (it has from 16, from sm_80)" if below else ""


def _backend(name: str) -> Callable[..., torch.Tensor]:
    """Backends that need packages of their own are imported when they are chosen."""
    if name == "triton":
        from mosaic_kernels.attention.triton import triton_tree_attention

        return triton_tree_attention
    if name == "flash":
        from mosaic_kernels.attention.flash import flash_tree_attention

        return flash_tree_attention
    if name == "flex":
        from mosaic_kernels.attention.flex import flex_tree_attention

        return flex_tree_attention
    return reference_tree_attention


def _depths(
    positions: IndexLike | None, window: int | None, chunk: int | None, k: torch.Tensor
) -> torch.Tensor | None:  # [U] int64, where they are needed
    if window is not None and chunk is not None:
        raise ValueError("a layer has a window or a chunk, not both")
    name, size = ("window", window) if chunk is None else ("chunk", chunk)
    if size is None:
        return None
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    if positions is None:
        raise ValueError(f"{name} needs positions")
    depth = as_index("positions", positions, k.device)
    if depth.shape != k.shape[:1]:
        raise ValueError(f"positions has shape {tuple(depth.shape)}, k has {len(k)} positions")
    return depth


def _as_queries(queries: IndexLike, q: torch.Tensor, num_nodes: int) -> torch.Tensor:  # [Uq] int64
    rows = as_index("queries", queries, q.device, below=num_nodes)
    if rows.shape != q.shape[:1]:
        raise ValueError(f"queries has shape {tuple(rows.shape)}, q has {q.shape[0]} rows")
    if rows.device.type == "cpu" and bool((rows[1:] <= rows[:-1]).any()):
        raise ValueError("queries must rise: sort them, and pass each position once")
    return rows


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> None:
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3 or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            "q must be [U, Hq, D], k [U, Hkv, D] and v [U, Hkv, V]; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must agree in D; got {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key/value heads do not divide {q.shape[1]} query heads")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k and v must share a floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if sinks is not None and not (sinks.shape == q.shape[1:2] and sinks.device == q.device):
        raise ValueError(
            f"sinks must be [{q.shape[1]}] on {q.device}, got {list(sinks.shape)} on {sinks.device}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must share a device; got {q.device}, {k.device}, {v.device}")
