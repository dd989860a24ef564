"""What a decoder layer keeps for its backward pass, measured without any weights.

The model is made as its config.json describes it, on PyTorch's meta device, whose tensors have a shape and a
dtype and no memory. There a layer runs forward and backward as Policy runs it, while the bytes of all tensors
alive are counted as they are made and freed. So whatever the family's code saves is counted, an adapter's
part and the fp32 copies of a norm included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mosaic_fast.config import Config
from mosaic_fast.errors import UserError
from mosaic_fast.learner.lora import Lora
from mosaic_fast.policy.checkpoint import in_one_line
from mosaic_fast.policy.folder import check_config
from mosaic_fast.policy.layer import run_layer, run_norm
from mosaic_fast.policy.layout import decoder_of, has_known_layer
from mosaic_fast.policy.support import check_model


class LiveBytes(TorchDispatchMode):
    """Counts storages made while it is entered: `now` alive, and the `peak` of that.

    known: tensors that were there before; what shares their storage is not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def shape_of(folder: Path, config: Config) -> PreTrainedModel:
    """The policy on the meta device, with adapters where the run has them.

    UserError for a folder that is missing or has no config.json, and for a model that is not supported.
    """
    if not folder.is_dir():
        raise UserError(
            f"model.path: there is no folder {folder}. Download the model there, or name where it is with "
            "--model.path; --dry-run needs no more of it than its config.json"
        )
    try:
        check_config(folder)
    except UserError as error:
        raise UserError(f"model.path: {folder}: {error}") from None
    try:
        described = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described, dtype=getattr(torch, config.model.dtype))
    except Exception as error:  # noqa: BLE001  a value of config.json can break any line of transformers
        raise UserError(f"model.path: {folder / 'config.json'}: {in_one_line(error)}") from None
    check_model(model)
    if config.model.lora_rank:
        Lora(model, config.model, config.seed)
    return model.train()


_NAME = "mosaic_attention_shapes"


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of a layer for a number of tokens."""

    input: int  # the hidden states that enter it: all that checkpointing keeps
    kept: int  # from its forward pass to its backward pass
    backward: int  # more, at the peak of its backward pass
    norm: int  # what the final norm keeps, and its output


def layer_memory(
    model: PreTrainedModel, tokens: int, *, on_cpu: bool, checkpointed: bool = False
) -> LayerMemory:
    """Run two layers of a model on the meta device; the second one is what is measured.

    on_cpu: attention computes in fp32 whatever the dtype, as its CPU backend does, and a layer that is not
        checkpointed is run in fewer operations, which keep less.
    """
    decoder = decoder_of(model)
    layer = decoder.layers[0]
    hidden = torch.empty(
        1, tokens, model.config.hidden_size, dtype=model.dtype, device="meta", requires_grad=True
    )
    positions = torch.empty(1, tokens, dtype=torch.int64, device="meta")
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    for (
        parameter
    ) in model.parameters():  # those of earlier micro-batches are there, and are counted elsewhere
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    known = [hidden, positions, *rotary, *grads, *model.parameters(), *model.buffers()]
    arguments: dict[str, object] = {
        "attention_mask": None,
        "position_ids": positions,
        "past_key_values": None,
        "use_cache": False,
        "position_embeddings": rotary,
        "on_cpu": on_cpu,
    }
    AttentionInterface.register(_NAME, _attention)
    model.config._attn_implementation = _NAME

    def run(hidden: Tensor) -> Tensor:
        if on_cpu and not checkpointed and has_known_layer(model, layer):
            attend = partial(_attention, on_cpu=True)
            return run_layer(model, layer, hidden, None, arguments, None, fewer=True, attend=attend)
        return layer(hidden, **arguments)

    with LiveBytes(known) as live:
        out = run(hidden)
        one = live.now - out.nbytes
        out = run(out)
        two = live.now - out.nbytes
        before_norm = live.now
        normed = run_norm(model, decoder.norm, out, on_cpu)
        norm = live.now - before_norm
        live.peak = live.now
        before = live.now
        normed.backward(torch.empty_like(normed))
        backward = live.peak - before
    for parameter in model.parameters():
        parameter.grad = None
    return LayerMemory(hidden.nbytes, two - one, backward, norm)


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, U, D]
    key: Tensor,  # [1, Hkv, U, D]
    value: Tensor,  # [1, Hkv, U, D]
    attention_mask: Tensor | None,
    *,
    on_cpu: bool,
    **unused: object,
) -> tuple[Tensor, None]:  # [1, U, Hq, D]
    heads = (x[0].transpose(0, 1) for x in (query, key, value))
    out = _Attention.apply(*(x.float() if on_cpu else x for x in heads))
    return out.to(query.dtype)[None], None


class _Attention(torch.autograd.Function):
    """Stands in for tree attention: saves and makes tensors of the same sizes, and computes nothing.

    Saved are q, k, v, the output and a logsumexp a row and head; made are the gradients.

    Values of a fused projection are a view that keeps all of it, as they are for the kernels.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = q.new_empty(q.shape)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, ...]:
        q, k, v, _, lse = ctx.saved_tensors
        _delta = torch.empty_like(lse)
        return tuple(x.new_empty(x.shape) for x in (q, k, v))
