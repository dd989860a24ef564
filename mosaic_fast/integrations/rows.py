"""The rows of a padded batch as a forest, and what was computed on the forest back in the rows' shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mosaic_fast.errors import UserError
from mosaic_fast.policy import Policy
from mosaic_kernels import PackedForest, pack_forest

IGNORED = -100  # the label of a token that is not scored, in transformers and TRL


@dataclass(frozen=True, eq=False)
class RowForest:
    """The real tokens of a batch of B rows of L, merged; B * (L - 1) values come back.

    Example, 0 being padding: rows [[0, 5, 6, 7], [5, 6, 8, 0]] are the rollouts [5, 6, 7] and [5, 6, 8], with
    places [1, 2, 3, 4, 5, 6].
    """

    forest: PackedForest
    places: Tensor  # [T] where each of its rollout tokens lies among the B * L of the batch
    shape: tuple[int, int]  # B, L

    def in_rows(self, values: Tensor) -> Tensor:
        """One value a rollout token [T] as [B, L - 1], from the second column on, zero at padding."""
        places = self.places.to(values.device)
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_copy(0, places, values).view(self.shape)[:, 1:]


def forest_of_rows(
    input_ids: Tensor,  # [B, L] int64
    labels: Tensor,  # [B, L] int64, the token's own id where it is scored, else -100
    attention_mask: Tensor | None = None,  # [B, L], 0 at padding; None: no padding
    position_ids: Tensor | None = None,  # [B or 1, L]; None: they rise by one along a row
) -> RowForest:
    """Merge the rows of a batch by their common prefixes.

    Padding may lie on either side. Without a mask, positions that do not rise by one begin a document of its
    own, as transformers reads packed rows. The first column's labels are never read: nothing predicts them.

    UserError where transformers would not run each row, or document, as it would run it alone: a hole in the
    mask, a mask that is no matrix, positions that jump; and where a label is not the token that lies there.
    """
    ids = input_ids.cpu().numpy()
    if ids.ndim != 2:
        raise UserError(f"input_ids has {ids.ndim} dimensions: rows of tokens have two")
    real = np.ones(ids.shape, np.bool_)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise UserError(f"attention_mask is {list(attention_mask.shape)}, input_ids {list(ids.shape)}")
        real = attention_mask.cpu().numpy() != 0
    first = real.copy()  # of a row or document
    first[:, 1:] &= ~real[:, :-1]
    if (first.sum(axis=1) > 1).any():
        raise UserError("attention_mask hides tokens in the middle of a row")
    if position_ids is not None:
        positions = np.broadcast_to(position_ids.cpu().numpy(), ids.shape)
        jumps = np.zeros(ids.shape, np.bool_)
        jumps[:, 1:] = np.diff(positions, axis=1) != 1
        if attention_mask is None:
            first |= jumps
        elif (jumps & real & ~first).any():
            raise UserError("position_ids jump inside a row, whose tokens attention_mask joins")
    scored = labels.cpu().numpy() != IGNORED
    scored[:, 0] = False
    if (scored & ~real).any():
        raise UserError("a token that attention_mask hides is scored")
    if (scored & first).any():
        raise UserError("the first token of a row or document is scored, which nothing of it predicts")
    if (labels.cpu().numpy() != ids)[scored].any():
        raise UserError("labels differ from the tokens that they lie at")
    starts = np.flatnonzero(first[real])[1:]
    forest = pack_forest(np.split(ids[real], starts), np.split(scored[real], starts))
    return RowForest(forest, torch.from_numpy(np.flatnonzero(real)), (ids.shape[0], ids.shape[1]))


def row_logprobs(
    model: PreTrainedModel,
    input_ids: Tensor,  # [B, L] int64
    labels: Tensor,  # [B, L] int64, the token's own id where it is scored, else -100
    attention_mask: Tensor | None = None,  # [B, L]
    position_ids: Tensor | None = None,  # [B or 1, L]
) -> Tensor:  # [B, L - 1] fp32, or fp64 for an fp64 model
    """Log-prob of each scored token, from the second column on, zero elsewhere; prefixes of rows are shared.

    It has the gradient that running the padded rows gives. `-row_logprobs(model, **batch).sum()` is the sum
    of the loss that transformers' Trainer averages. UserError as in `forest_of_rows` and `Policy`.
    """
    rows = forest_of_rows(input_ids, labels, attention_mask, position_ids)
    return rows.in_rows(Policy(model).logprobs(rows.forest))
