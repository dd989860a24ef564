"""Preference losses by Triton kernels: log-probs -> margins of rollouts -> losses of pairs, and back."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from mosaic_kernels.dispatch import launch
from mosaic_kernels.forest.layout import PackedForest, pack_forest
from mosaic_kernels.gather_sum import gather_sum_kernel
from mosaic_kernels.logprob import linear_logprob
from mosaic_kernels.logprob.reference import Groups, grouped
from mosaic_kernels.preference import kernels
from mosaic_kernels.preference.reference import needed_edges, reference_pairwise_preference_loss
from mosaic_kernels.selfcheck import Deviation, check_once, deviations_of

TOKEN_BLOCK, LANES = 1024, 128


@dataclass(frozen=True, eq=False)
class _Tokens:
    """How log-probs make up rollouts: by token, or, with edge_of_token, by edge of a tree."""

    mask: torch.Tensor  # [T] uint8
    cu_seqlens: torch.Tensor  # [R+1] int64
    edge_of_token: torch.Tensor | None = None  # [T] int32, -1 where not counted
    rollouts_of_edges: Groups | None = None  # for each edge, the rollouts that count it


def triton_pairwise_preference_loss(
    policy_logprobs: torch.Tensor,  # [T] bf16, fp16 or fp32
    reference_logprobs: torch.Tensor | None,  # [T]
    mask: torch.Tensor,  # [T] bool
    cu_seqlens: torch.Tensor,  # [R+1] int64
    pairs: torch.Tensor,  # [P, 2] int64
    preference: torch.Tensor,  # [P]
    beta: float,
) -> torch.Tensor:  # [P] fp32
    """Computed in fp32; ValueError for fp64 log-probs."""
    _refuse_fp64("pairwise_preference_loss", policy_logprobs)
    variant = (policy_logprobs.dtype, None if reference_logprobs is None else reference_logprobs.dtype)
    check_once("pairwise_preference_loss", policy_logprobs.device, variant, deviations)
    tokens = _Tokens(mask.contiguous().view(torch.uint8), cu_seqlens.contiguous())
    return _PreferenceLoss.apply(policy_logprobs, reference_logprobs, tokens, pairs, preference, beta)


def triton_forest_preference_loss(
    hidden: torch.Tensor,  # [U, D]
    weight: torch.Tensor,  # [V, D]
    forest: PackedForest,
    pairs: torch.Tensor,  # [P, 2] int64
    preference: torch.Tensor,  # [P]
    reference_logprobs: torch.Tensor | None,  # [T]
    beta: float,
) -> torch.Tensor:  # [P] fp32
    """One log-prob for each edge that some pair needs; the margins gather them along the tree."""
    _refuse_fp64("forest_preference_loss", hidden, weight)
    device = hidden.device
    variant = (torch.float32, None if reference_logprobs is None else reference_logprobs.dtype)
    check_once("forest_preference_loss", device, variant, deviations)
    needed = needed_edges(forest, pairs.cpu().numpy())
    edge_logprobs = linear_logprob(
        hidden[torch.from_numpy(needed.rows).to(device)], weight, needed.targets,
        rows=needed.row_of_edge, backend="triton",
    )  # fmt: skip
    tokens = _tree_tokens(forest, needed.edge_of_token, len(needed.targets), device)
    return _PreferenceLoss.apply(edge_logprobs, reference_logprobs, tokens, pairs, preference, beta)


def _tree_tokens(
    forest: PackedForest, edge_of_token: np.ndarray, num_edges: int, device: torch.device
) -> _Tokens:
    counted = edge_of_token >= 0
    rollout_of = np.repeat(np.arange(forest.num_rollouts), np.diff(forest.cu_seqlens))
    by_edge = grouped(torch.from_numpy(edge_of_token[counted]).to(device), num_edges)
    owners = torch.from_numpy(rollout_of[counted]).to(device, torch.int32)
    return _Tokens(
        torch.from_numpy(forest.trained).to(device).view(torch.uint8),
        torch.from_numpy(forest.cu_seqlens).to(device),
        torch.from_numpy(edge_of_token).to(device, torch.int32),
        Groups(owners[by_edge.members], by_edge.starts),
    )


class _PreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: torch.Tensor,  # [T], or [E] for tokens with edges
        reference_logprobs: torch.Tensor | None,  # [T]
        tokens: _Tokens,
        pairs: torch.Tensor,  # [P, 2] int64
        preference: torch.Tensor,  # [P]
        beta: float,
    ) -> torch.Tensor:
        device, num_rollouts, num_pairs = logprobs.device, len(tokens.cu_seqlens) - 1, len(pairs)
        margin = torch.empty(num_rollouts, dtype=torch.float32, device=device)
        loss, slope = (torch.empty(num_pairs, dtype=torch.float32, device=device) for _ in range(2))
        logprobs, reference = logprobs.contiguous(), reference_logprobs
        if num_pairs:
            launch(
                kernels.margin_kernel, num_rollouts,
                logprobs, tokens.mask if tokens.edge_of_token is None else tokens.edge_of_token,
                logprobs if reference is None else reference.detach().contiguous(),
                tokens.mask, tokens.cu_seqlens, margin,
                BLOCK=TOKEN_BLOCK, EDGES=tokens.edge_of_token is not None, REFERENCE=reference is not None,
            )  # fmt: skip
            launch(
                kernels.pair_kernel, -(-num_pairs // LANES),
                margin, pairs.int().contiguous(), preference.float().contiguous(), loss, slope,
                num_pairs, float(beta), BLOCK=LANES,
            )  # fmt: skip
        ctx.save_for_backward(slope, pairs)
        ctx.tokens, ctx.shape, ctx.dtype = tokens, logprobs.shape, logprobs.dtype
        return loss

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        slope, pairs = ctx.saved_tensors
        tokens, device = ctx.tokens, slope.device
        num_rollouts = len(tokens.cu_seqlens) - 1
        grad = torch.zeros(ctx.shape, dtype=torch.float32, device=device)
        if len(pairs):
            sides = grouped(pairs.flatten(), num_rollouts)
            by_edge: Groups | None = tokens.rollouts_of_edges
            out = grad if by_edge is None else torch.empty(num_rollouts, dtype=torch.float32, device=device)
            launch(
                kernels.margin_gradient_kernel, num_rollouts,
                grad_outputs[0].float().contiguous(), slope, sides.members, sides.starts,
                tokens.mask, tokens.cu_seqlens, out, BLOCK=LANES, TOKENS=by_edge is None,
            )  # fmt: skip
            if by_edge is not None and len(grad):
                launch(
                    gather_sum_kernel, -(-len(grad) // LANES),
                    out, by_edge.members, by_edge.starts, grad, len(grad), BLOCK=LANES,
                )  # fmt: skip
        return grad.to(ctx.dtype), *[None] * 5


def _refuse_fp64(op: str, *tensors: torch.Tensor) -> None:
    if any(x.dtype == torch.float64 for x in tensors):
        raise ValueError(f"{op}: backend='triton' computes in fp32; for fp64 use backend='reference'")


def deviations(device: torch.device, variant: Hashable) -> Mapping[str, Deviation]:
    """The self-check: losses and gradients of a small forest, by token and by edge, against fp64.

    variant is the dtype of the policy's log-probs, and that of the reference's, or None without.
    """
    policy_dtype, reference_dtype = variant  # pyrefly: ignore [not-iterable]
    rng = np.random.default_rng(0)
    trunk = rng.integers(50, size=40).tolist()
    sequences = [trunk[:cut] + rng.integers(50, size=300).tolist() for cut in (40, 40, 25, 0)]
    forest = pack_forest([*sequences, sequences[0]])
    generator = torch.Generator().manual_seed(0)
    by_node = torch.randn(forest.num_nodes, generator=generator)
    drawn = torch.randn(forest.num_tokens, generator=generator)
    reference = None if reference_dtype is None else drawn.to(device, reference_dtype)
    pairs = torch.tensor([[0, 1], [2, 0], [3, 2], [4, 1]], device=device)
    preference = torch.tensor([1.0, 0.5, 0.0, 0.3], device=device)
    policy = by_node[torch.from_numpy(forest.node_index)].to(device, policy_dtype)
    mask, cu_seqlens = (torch.from_numpy(x).to(device) for x in (forest.trained, forest.cu_seqlens))
    needed = needed_edges(forest, pairs.cpu().numpy())
    edge_of_token = torch.from_numpy(needed.edge_of_token)
    first_token = torch.zeros(len(needed.targets), dtype=torch.int64)
    first_token[edge_of_token[edge_of_token >= 0]] = torch.nonzero(edge_of_token >= 0)[:, 0]
    tree = _tree_tokens(forest, needed.edge_of_token, len(needed.targets), device)

    def results(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaf = policy.to(dtype, copy=True).requires_grad_()
        loss = reference_pairwise_preference_loss(
            leaf, None if reference is None else reference.to(dtype), mask, cu_seqlens, pairs,
            preference.to(dtype), 0.1,
        )  # fmt: skip
        dtokens = torch.autograd.grad(loss.sum(), leaf)[0]
        counted = (edge_of_token >= 0).to(device)
        dedges = dtokens.new_zeros(len(first_token)).index_add(
            0, edge_of_token.to(device)[counted], dtokens[counted]
        )
        return {"loss": loss, "tree loss": loss, "dtokens": dtokens, "dedges": dedges}

    leaf, edge_leaf = policy.clone().requires_grad_(), policy[first_token.to(device)].requires_grad_()
    loss, tree_loss = (
        _PreferenceLoss.apply(x, reference, tokens, pairs, preference, 0.1)
        for x, tokens in ((leaf, _Tokens(mask.view(torch.uint8), cu_seqlens)), (edge_leaf, tree))
    )
    ours = {
        "loss": loss,
        "tree loss": tree_loss,
        "dtokens": torch.autograd.grad(loss.sum(), leaf)[0],
        "dedges": torch.autograd.grad(tree_loss.sum(), edge_leaf)[0],
    }
    return deviations_of(ours, results(torch.float32), results(torch.float64), policy_dtype)
