"""What a decoder layer keeps for its backward pass, measured without any weights.

The model is made as its config.json describes it, on PyTorch's meta device, whose tensors have a shape and a
dtype and no memory. There a layer runs forward and backward as Policy runs it, while the bytes of all tensors
alive are counted as they are made and freed. So whatever the family's code saves is counted, an adapter's
part and the fp32 copies of a norm included.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from mosaic_fast.config import Config
from mosaic_fast.errors import UserError
from mosaic_fast.learner.lora import Lora
from mosaic_fast.policy.admission import admit
from mosaic_fast.policy.checkpoint import in_one_line
from mosaic_fast.policy.folder import check_config
from mosaic_fast.policy.forward import Way, way_of
from mosaic_fast.policy.layer import run_layer, run_norm
from mosaic_fast.policy.layout import checkpoint_activations, decoder_of, has_known_layer
from mosaic_fast.policy.small_copy import kinds_of_layers
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
        if func is torch.ops.aten._grouped_mm.default:
            result: object = _grouped_product(*args, **(kwargs or {}))
        else:
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


def _grouped_product(a: Any, b: Any, offs: Any, *unused: object, **more: object) -> Tensor:
    """The result of experts' products, which the meta device has for bfloat16 alone."""
    match a.ndim, b.ndim:
        case 2, 3:  # [S, K], [E, K, N]
            return a.new_empty(a.shape[0], b.shape[2])
        case 2, 2:  # [K, S], [S, N]: a gradient of the weights
            return a.new_empty(len(offs), a.shape[0], b.shape[1])
        case _:  # [E, M, K], [K, S]
            return a.new_empty(a.shape[1], b.shape[1])


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
    try:
        check_model(model)
        admit(model)
    except UserError as error:
        raise UserError(f"model.path: {folder}: {error}") from None
    if config.model.lora_rank:
        Lora(model, config.model, config.seed)
    return model.train()


_NAME = "mosaic_attention_shapes"


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of a decoder's layers for a number of tokens."""

    kept: int  # from the forward pass to the backward pass, by all layers
    backward: int  # more, at the peak of the backward pass
    norm: int  # what the final norm keeps, and its output


def layer_memory(
    model: PreTrainedModel, tokens: int, *, on_cpu: bool, checkpointed: bool = False
) -> LayerMemory:
    """Run a model's layers on the meta device as Policy does: of each kind two, and the second is measured.

    Where layers cannot be called one by one, the whole decoder runs.

    on_cpu: attention computes in fp32 whatever the dtype, as its CPU backend does, and a layer that is not
        checkpointed is run in fewer operations, which keep less.
    """
    for (
        parameter
    ) in model.parameters():  # those of earlier micro-batches are there, and are counted elsewhere
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    AttentionInterface.register(_NAME, _attention)
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = _NAME
    positions = torch.empty(1, tokens, dtype=torch.int64, device="meta")
    way = way_of(model, admit(model).way)
    if way in ("parts", "layers"):
        found = _by_layer(model, way, positions, on_cpu=on_cpu, checkpointed=checkpointed)
    else:
        found = _by_decoder(model, positions, on_cpu=on_cpu, checkpointed=checkpointed)
    for parameter in model.parameters():
        parameter.grad = None
    return found


def _there(model: PreTrainedModel) -> list[Tensor]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*grads, *model.parameters(), *model.buffers()]


def _by_layer(
    model: PreTrainedModel, way: Way, positions: Tensor, *, on_cpu: bool, checkpointed: bool
) -> LayerMemory:
    decoder = decoder_of(model)
    width = model.config.hidden_size
    hidden = torch.empty(1, positions.shape[1], width, dtype=model.dtype, device="meta", requires_grad=True)
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    known = [hidden, positions, *rotary, *_there(model)]
    arguments: dict[str, object] = {
        "attention_mask": None,
        "position_ids": positions,
        "past_key_values": None,
        "use_cache": False,
        "position_embeddings": rotary,
        "on_cpu": on_cpu,
    }

    def run(layer: nn.Module, hidden: Tensor) -> Tensor:
        if way == "parts" and on_cpu and not checkpointed and has_known_layer(model, layer):
            attend = partial(_attention, on_cpu=True)
            return run_layer(model, layer, hidden, None, arguments, None, fewer=True, attend=attend)
        return layer(hidden, **arguments)

    counts = Counter(kinds_of_layers(model))
    kept, largest, backward, norm = 0, 0, 0, 0
    for first, count in counts.items():
        layer = decoder.layers[first]
        with LiveBytes(known) as live:
            out = run(layer, hidden)
            one = live.now - out.nbytes
            out = run(layer, out)
            two = live.now - out.nbytes
            before_norm = live.now
            normed = run_norm(model, decoder.norm, out, on_cpu and way == "parts")
            norm = live.now - before_norm
            live.peak = live.now
            before = live.now
            normed.backward(torch.empty_like(normed))
            backward = max(backward, live.peak - before)
        kept += count * (two - one)
        largest = max(largest, two - one)
    inputs = model.config.num_hidden_layers * hidden.nbytes
    if not checkpointed:
        return LayerMemory(kept + hidden.nbytes, backward, norm)
    if way == "parts" and has_known_layer(model, decoder.layers[-1]):
        return LayerMemory(inputs + largest, backward, norm)  # the last one, on some rows, never is
    return LayerMemory(inputs, largest + backward, norm)


def _by_decoder(
    model: PreTrainedModel, positions: Tensor, *, on_cpu: bool, checkpointed: bool
) -> LayerMemory:
    if checkpointed:
        checkpoint_activations(model)
    tokens = torch.zeros_like(positions)
    with LiveBytes([tokens, positions, *_there(model)]) as live:
        out = cast(nn.Module, decoder_of(model))(
            input_ids=tokens, position_ids=positions, use_cache=False, on_cpu=on_cpu
        ).last_hidden_state
        kept = live.now
        live.peak = live.now
        out.backward(torch.empty_like(out))
        return LayerMemory(kept, live.peak - kept, out.nbytes)


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, U, D]
    key: Tensor,  # [1, Hkv, U, D]
    value: Tensor,  # [1, Hkv, U, V]
    attention_mask: Tensor | None,
    *,
    on_cpu: bool,
    **unused: object,
) -> tuple[Tensor, None]:  # [1, U, Hq, V]
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
        out = q.new_empty(*q.shape[:2], v.shape[2])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, ...]:
        q, k, v, _, lse = ctx.saved_tensors
        _delta = torch.empty_like(lse)
        return tuple(x.new_empty(x.shape) for x in (q, k, v))
