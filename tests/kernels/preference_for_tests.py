"""What tests of the preference losses share: results and gradients against the oracle."""

from collections.abc import Sequence

import numpy as np
import torch

from mosaic_kernels import PackedForest
from mosaic_kernels.magnitudes import forest_preference_magnitudes, preference_magnitudes
from mosaic_kernels.oracle import preference_loss_of_pairs, preference_loss_of_rollouts
from mosaic_kernels.rounding import weighting, worst_of
from tests.kernels.criterion import assert_right


def assert_pairs_right(
    loss: torch.Tensor,  # [P]
    policy: torch.Tensor,  # [T] what it was computed from
    exact: torch.Tensor,  # [T] the same in fp64
    reference: torch.Tensor | None,  # [T]
    forest: PackedForest,
    pairs: np.ndarray,
    preference: np.ndarray,
    beta: float,
    seed: int,
) -> None:
    """Losses and gradient, for one weighting of the losses, are those of one pair at a time."""
    reference = reference if reference is None else reference.detach().double().cpu()
    indices, choices = pairs.tolist(), preference.tolist()
    expected = preference_loss_of_pairs(
        exact, reference, forest.trained.tolist(), forest.cu_seqlens.tolist(), indices, choices, beta=beta
    )
    weights = weighting([expected], seed)
    sizes = exact.detach().abs() + (0 if reference is None else reference.abs())
    magnitudes = preference_magnitudes(
        exact.detach(), sizes, reference, forest, indices, choices, weights[0], beta=beta
    )
    terms = max(forest.num_tokens, len(pairs), 1)
    off = worst_of([loss], [policy], [expected], [exact], weights, magnitudes, terms)
    assert_right(("loss", "dpolicy"), off)


def assert_forest_right(
    loss: torch.Tensor,  # [P]
    leaves: Sequence[torch.Tensor],  # hidden [U, D], weight [V, D]
    reference: torch.Tensor | None,  # [T]
    forest: PackedForest,
    pairs: np.ndarray,
    preference: np.ndarray,
    beta: float,
    seed: int,
) -> None:
    """Losses and gradients are those of one rollout and one pair at a time."""
    hidden, weight = exact = [x.detach().double().cpu().requires_grad_() for x in leaves]
    reference = reference if reference is None else reference.detach().double().cpu()
    indices, choices = pairs.tolist(), preference.tolist()
    expected = preference_loss_of_rollouts(
        hidden, weight, forest, indices, choices, reference_logprobs=reference, beta=beta
    )
    weights = weighting([expected], seed)
    magnitudes = forest_preference_magnitudes(
        hidden, weight, forest, indices, choices, weights[0],
        reference=reference, beta=beta, dtype=leaves[0].dtype,
    )  # fmt: skip
    terms = max(forest.num_tokens, len(pairs), *weight.shape)
    off = worst_of([loss], leaves, [expected], exact, weights, magnitudes, terms)
    assert_right(("loss", "dhidden", "dweight"), off)
