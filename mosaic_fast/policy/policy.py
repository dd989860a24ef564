"""Log-probs of rollouts under an unmodified Hugging Face causal LM, on shared prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, overload
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mosaic_fast.errors import UserError
from mosaic_fast.policy.admission import Admission, admit, check_attended
from mosaic_fast.policy.attention import KeysAndValues, TreeForward
from mosaic_fast.policy.checkpoint import load_model, save_model
from mosaic_fast.policy.forest_tensors import ForestTensors, forest_tensors
from mosaic_fast.policy.forward import ForwardInParts, final_hidden, layer_calls, run_model, way_of
from mosaic_fast.policy.selected import forest_selected
from mosaic_fast.policy.support import check_model, check_modules, check_rope_lengths
from mosaic_kernels import PackedForest
from mosaic_kernels.fixed_order import pick


@dataclass(frozen=True, eq=False)
class ForwardResult:
    """What a forward gives: one log-prob a distinct edge, one entropy a row."""

    edge_logprobs: Tensor  # [E]
    row_entropy: Tensor | None  # [N]
    keys_and_values: KeysAndValues  # of the forwarded nodes, empty if they were not to be kept


class Policy:
    """A causal LM of transformers that is run on forests, if its kind has shown to be exact there.

    The model's classes, weights and modules stay as they are, and its attention setting changes only while
    `logprobs` runs, so an inference engine may share the model. Every module is called as a module: hooks,
    LoRA layers and replaced forwards are honoured, though those of the final norm, and of an LM head that is
    more than a matrix, see only the rows that predict a trained token.

    >>> policy = Policy.from_pretrained("models/qwen3-4b")
    >>> forest = pack_forest([[5, 6, 7], [5, 6, 8]])
    >>> policy.logprobs(forest)  # zeros at both 5s; both 6s share one edge
    tensor([0.0000, -2.3, -4.1, 0.0000, -2.3, -3.7], grad_fn=...)
    """

    model: PreTrainedModel
    forward_in_parts: ForwardInParts | None  # of sharded weights; None: the model's parts called as they are

    def __init__(self, model: PreTrainedModel, *, attention: str = "auto", lm_head: str = "auto") -> None:
        """UserError names what the model has that a forest forward would get wrong.

        attention, lm_head: backends of `tree_attention` and `linear_logprob`.
        """
        check_model(model)
        self.admission: Admission = admit(model)
        self.model, self._attention, self._lm_head = model, attention, lm_head
        self.forward_in_parts: ForwardInParts | None = None
        self._prepared: WeakKeyDictionary[PackedForest, ForestTensors] = WeakKeyDictionary()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        trainable: bool = True,
        attention: str = "auto",
        lm_head: str = "auto",
    ) -> Policy:
        """Load a local folder with safetensors weights; see `load_model` for the errors.

        trainable: False freezes every parameter and puts the model in eval mode (a reference policy).
        attention, lm_head: as of a Policy.
        """
        model = load_model(Path(path), dtype, device)
        model.requires_grad_(trainable)
        return cls(model.train(trainable), attention=attention, lm_head=lm_head)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers' own from_pretrained loads."""
        save_model(self.model, Path(path))

    @overload
    def logprobs(
        self,
        forest: PackedForest,
        *,
        temperature: float = ...,
        return_entropy: Literal[False] = ...,
        uncut: PackedForest | None = ...,
    ) -> Tensor: ...
    @overload
    def logprobs(
        self,
        forest: PackedForest,
        *,
        temperature: float = ...,
        return_entropy: Literal[True],
        uncut: PackedForest | None = ...,
    ) -> tuple[Tensor, Tensor]: ...
    def logprobs(
        self,
        forest: PackedForest,
        *,
        temperature: float = 1.0,
        return_entropy: bool = False,
        uncut: PackedForest | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-prob of each trained rollout token given its prefix [T], zero at all others. Differentiable.

        Equal, with its gradients, to running every rollout alone through the model. fp32, or fp64 for an
        fp64 model. With nothing to train the result is a zero without gradient to any weight.

        temperature: divides the logits, for log-probs and entropy.
        return_entropy: also the entropy [T], in nats, of the distribution that predicted each trained token.
        uncut: for a part of `split_forest`, the forest it was cut from; needed only where RoPE depends on
            the length of a rollout (longrope, dynamic).
        """
        tensors = self._tensors(forest)
        if not len(tensors.targets):
            return _nothing_trained(self.model, forest, return_entropy)
        result = self.run(
            tensors,
            temperature=temperature,
            return_entropy=return_entropy,
            longest_alone=self.check_lengths(forest, uncut),
        )
        logprobs = spread(result.edge_logprobs, tensors.token_edges, tensors)
        if not return_entropy:
            return logprobs
        assert result.row_entropy is not None
        return logprobs, spread(result.row_entropy, tensors.token_rows, tensors)

    def run(
        self,
        forest: ForestTensors,
        *,
        longest_alone: int,
        temperature: float = 1.0,
        return_entropy: bool = False,
        held: Sequence[KeysAndValues] = (),
        keep: bool = False,
    ) -> ForwardResult:
        """One forward over prepared indices. Differentiable, in the weights and in what is held.

        longest_alone: length of the longest rollout, from `check_lengths`.
        held: keys and values of the path above the forwarded nodes, from the root down.
        keep: also return the forward's own keys and values, to be held for others.
        """
        if not temperature > 0:
            raise UserError(f"temperature must be above 0, got {temperature}")
        model = self.model
        check_modules(model)
        tree = TreeForward(forest, held, {} if keep else None, self._attention, self._lm_head)
        with forest_selected(model):
            way = way_of(model, self.admission.way)
            forward = self.forward_in_parts or partial(run_model, model, way)
            edge_logprobs, row_entropy = forward(tree, longest_alone, temperature, return_entropy)
        check_attended(model, tree)
        return ForwardResult(edge_logprobs, row_entropy, tree.kept or {})

    def hidden(self, forest: ForestTensors, *, longest_alone: int) -> Tensor:  # [N, D]
        """What the LM head reads at the rows of a forest, for a head that is not the model's own.

        The model's forward may be another's, as the head is; its decoder has to be `has_known_decoder`.
        """
        check_modules(self.model)
        tree = TreeForward(forest)
        with forest_selected(self.model):
            hidden = final_hidden(
                self.model, tree, longest_alone, layer_calls(self.model, self.admission.way)
            )
        check_attended(self.model, tree)
        return hidden

    def _tensors(self, forest: PackedForest) -> ForestTensors:
        """The forest's indices on the model's device, kept for as long as the forest is."""
        device = self.model.device
        tensors = self._prepared.get(forest)
        if tensors is None or tensors.tokens.device != device:
            tensors = self._prepared[forest] = forest_tensors(forest, device)
        return tensors

    def check_lengths(self, forest: PackedForest, uncut: PackedForest | None = None) -> int:
        """Length of the longest rollout, with the end that a part of a cut forest may lack.

        UserError where rollouts alone would see other rotary frequencies than they do together.
        """
        lengths = np.diff(forest.cu_seqlens)
        filled = forest.cu_seqlens[:-1][lengths > 0]
        lengths = lengths[lengths > 0]
        if not len(lengths):
            return 0
        if forest.source is not None and uncut is not None:
            rollouts = np.searchsorted(uncut.cu_seqlens, forest.source[filled], side="right") - 1
            lengths = np.diff(uncut.cu_seqlens)[rollouts]
        known = forest.source is None or uncut is not None
        check_rope_lengths(self.model, int(lengths.min()), int(lengths.max()), lengths_known=known)
        return int(lengths.max())


def spread(values: Tensor, index: Tensor, tensors: ForestTensors) -> Tensor:
    """values[index] at the trained tokens of [T], zero elsewhere."""
    return values.new_zeros(tensors.num_tokens).index_copy(0, tensors.trained_tokens, pick(values, index))


def _nothing_trained(
    model: PreTrainedModel, forest: PackedForest, return_entropy: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Zeros that a loss can be backpropagated through, as it can through other parts of a step."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(forest.num_tokens, dtype=dtype, device=model.device)
    zeros.requires_grad_(torch.is_grad_enabled())
    return (zeros, zeros.detach().requires_grad_(zeros.requires_grad)) if return_entropy else zeros
