"""Attention with a softcap in plain PyTorch, in the fused kernel's place: it cannot bend scores.

Scores are computed in slices of MAX_SCORES and again in the backward pass, and none is kept between the two.
"""

from collections.abc import Iterator

import torch

MAX_SCORES = 2**22  # in memory at a time: 16 MiB in fp32


def capped_forward(
    q: torch.Tensor,  # [N, Hq, L, D]
    k: torch.Tensor,  # [N, Hkv, K, D]
    v: torch.Tensor,  # [N, Hkv, K, V]
    *,
    causal: bool,
    scale: float,
    softcap: float,
    bias: torch.Tensor | None = None,  # [N, 1, L, K], 0 or -inf
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attended values [N, Hq, L, V] and the logsumexp [N, Hq, L] of the bent scores."""
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
    for part in _slices(q, k):
        scores, _ = _scores(q, k, part, causal, scale, softcap, bias)
        lse[part] = total = torch.logsumexp(scores, -1)
        weights = (scores - total[..., None]).exp_()
        out[part] = (_grouped(weights, k) @ v[part[0]]).view_as(out[part])
    return out, lse


def capped_backward(
    grad: torch.Tensor,  # [N, Hq, L, V] of the whole softmax's output
    q: torch.Tensor,  # [N, Hq, L, D]
    k: torch.Tensor,  # [N, Hkv, K, D]
    v: torch.Tensor,  # [N, Hkv, K, V]
    out: torch.Tensor,  # [N, Hq, L, V] of the whole softmax
    lse: torch.Tensor,  # [N, Hq, L] of the whole softmax
    *,
    causal: bool,
    scale: float,
    softcap: float,
    bias: torch.Tensor | None = None,  # [N, 1, L, K]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What these keys add to the gradients of q, k and v."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for part in _slices(q, k):
        blocks = part[0]
        scores, bent = _scores(q, k, part, causal, scale, softcap, bias)
        weights = (scores - lse[part][..., None]).exp_()
        incoming = _grouped(grad[part], k)
        dv[blocks] += _grouped(weights, k).mT @ incoming
        delta = (grad[part] * out[part]).sum(-1, keepdim=True)
        d_scores = (incoming @ v[blocks].mT).view_as(weights).sub_(delta).mul_(weights)
        d_scores = _grouped(d_scores.mul_(1 - bent * bent).mul_(scale), k)
        dq[part] = (d_scores @ k[blocks]).view_as(dq[part])
        dk[blocks] += d_scores.mT @ _grouped(q[part], k)
    return dq, dk, dv


Slice = tuple[slice, slice, slice]  # blocks, all heads, rows


def _slices(q: torch.Tensor, k: torch.Tensor) -> Iterator[Slice]:
    """Some rows of one block at a time, or whole blocks where several fit."""
    (blocks, heads, rows, _), keys = q.shape, k.shape[2]
    most = max(1, MAX_SCORES // (heads * keys))  # rows
    height, depth = min(rows, most), max(1, most // rows)
    for block in range(0, blocks, depth):
        for row in range(0, rows, height):
            yield slice(block, block + depth), slice(None), slice(row, min(row + height, rows))


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    part: Slice,
    causal: bool,
    scale: float,
    softcap: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # [n, Hq, l, K] twice
    """Scores, -inf where hidden, and the tanh that bent them."""
    blocks, _, rows = part
    products = _grouped(q[part], k) @ k[blocks].mT
    bent = (products.view(*q[part].shape[:3], -1) * (scale / softcap)).tanh_()
    scores = bent * softcap
    if bias is not None:
        scores += bias[part]
    if causal:
        at = torch.arange(k.shape[2])
        scores.masked_fill_(at > at[rows, None], -torch.inf)
    return scores, bent


def _grouped(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[n, Hq, l, ...] -> [n, Hkv, Hq / Hkv * l, ...]: the heads that share keys as rows of one."""
    return x.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
