"""Tree attention inside an unmodified transformers model, for the duration of a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from mosaic_fast.errors import UserError
from mosaic_fast.policy.forest_tensors import ForestTensors
from mosaic_kernels import tree_attention
from mosaic_rollout.engine.attention import chunk_of, tempered
from mosaic_rollout.engine.segments import Segments

ATTENTION_NAME = "mosaic_tree_attention"
_OF_NO_CONCERN = {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"}
"""Keywords that say nothing of what a token sees beyond what the forest says."""

KeysAndValues = dict[tuple[str, int], tuple[Tensor, ...]]
"""("keys", layer) -> rotated keys [U, Hkv, D] and values [U, Hkv, V] of a forward's nodes.

("states", layer) -> what a recurrence hands on at the last of them: inputs of the convolution, state.
"""


@dataclass(eq=False)
class TreeForward:
    """One forward over a forest. Travels as the keyword `tree` from the layers to their attention."""

    forest: ForestTensors
    held: Sequence[KeysAndValues] = ()  # of the path above the forwarded nodes, from the root down
    kept: KeysAndValues | None = None  # filled with the forward's own, with their graph, where asked for
    attention: str = "auto"  # backend of tree_attention
    lm_head: str = "auto"  # backend of linear_logprob
    attended: set[int] = field(default_factory=set)  # layers that called the attention interface
    keywords: set[str] = field(default_factory=set)  # what they handed to it that is not read

    def keep(self, name: tuple[str, int], made: tuple[Tensor, ...]) -> None:
        """Keep what a layer made, where that is asked for.

        Checkpointing runs a layer again in the backward pass; the graph is that of the first run.
        """
        if self.kept is not None and name not in self.kept:
            self.kept[name] = made

    @property
    def segments(self) -> Segments:
        """This and what follows is what recurrent layers ask for, as a `Handed`."""
        return self.forest.segments

    @property
    def wants_states(self) -> bool:
        return self.kept is not None

    def begin(self, layer: int) -> tuple[Tensor, ...] | None:
        return self.held[-1]["states", layer] if self.held else None

    def end(self, layer: int, left: tuple[Tensor, ...]) -> None:
        self.attended.add(layer)
        self.keep(("states", layer), left)  # what is kept is a chain: one segment

    def with_held(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [C + U, Hkv, D] and values [C + U, Hkv, V] of a layer: its own behind the held ones."""
        self.keep(("keys", layer), (key, value))
        if not self.held:
            return key, value
        keys, values = zip(*(one["keys", layer] for one in self.held), strict=True)
        return torch.cat([*keys, key]), torch.cat([*values, value])


def forest_attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, U, D], or [1, Hq, N, D] with on_rows
    key: Tensor,  # [1, Hkv, U, D]
    value: Tensor,  # [1, Hkv, U, V]
    attention_mask: Tensor | None,  # never read: the forest says what is visible
    *,
    tree: TreeForward | None = None,
    on_rows: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [Hq] a sink a head
    **unused: object,
) -> tuple[Tensor, None]:  # [1, U or N, Hq, V]
    """transformers' attention signature on top of `tree_attention`."""
    if tree is None:
        raise UserError(f"{ATTENTION_NAME} runs inside a Policy's forward only: choose another attention")
    if dropout:
        raise UserError(f"attention_dropout is {dropout}: an exact forest forward needs 0")
    if torch.is_autocast_enabled(query.device.type):  # norms and rotations leave it in part, SDPA enters it
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    forest = tree.forest
    layer = cast(int, module.layer_idx)
    tree.attended.add(layer)
    tree.keywords |= {name for name, value in unused.items() if value is not None} - _OF_NO_CONCERN
    keys, values = tree.with_held(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    # A window or a chunk as long as the longest rollout hides nothing.
    window, chunk = (
        size if size is not None and size < forest.longest else None
        for size in (sliding_window, chunk_of(module))
    )
    out = tree_attention(
        tempered(module, query, forest.positions[0])[0].transpose(0, 1),
        keys,
        values,
        forest.subtree_end,
        queries=forest.row_queries if on_rows else forest.queries,
        positions=None if window is None and chunk is None else forest.key_positions,
        window=window,
        chunk=chunk,
        softcap=softcap,
        sinks=s_aux,
        scale=scaling,
        backend=tree.attention,
    )
    return out[None], None
