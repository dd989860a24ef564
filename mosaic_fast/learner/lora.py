"""Low-rank adapters through peft: the base weights are frozen, and are the reference policy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mosaic_fast.config import ModelConfig
from mosaic_fast.errors import UserError
from mosaic_fast.policy.checkpoint import check_saved, is_tied, save_model, weights_of
from mosaic_rollout.engine.recurrent import read_by_kernels

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "adapter"
"""Folder of the adapter inside a checkpoint, beside the merged weights."""


class Lora:
    """Adapters put into a model, in place: the model object stays the one that policy and engine share.

    LoRA: Hu et al., arXiv 2106.09685. B starts at 0, so the policy starts as its reference.
    """

    def __init__(self, model: PreTrainedModel, config: ModelConfig, seed: int) -> None:
        """UserError where peft is missing or a target names no module. A is drawn from `seed` alone."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise UserError("model.lora_rank needs peft: pip install 'mosaic-fast[lora]'") from None
        targets, head = config.lora_targets, model.get_output_embeddings()
        linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        # A router may be a Linear whose forward gives more than a product: it takes no adapter. Nor does what
        # a fused kernel reads the weight of.
        read = read_by_kernels(model)
        plain = [n for n, m in linears.items() if type(m).forward is nn.Linear.forward and m not in read]
        if targets == ("all-linear",) and len(plain) < len(linears):
            targets = tuple(name for name in plain if linears[name] is not head)
        settings = LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
            target_modules="all-linear" if targets == ("all-linear",) else list(targets),
            lora_dropout=0.0,
        )
        linear = {name.rsplit(".", 1)[-1] for name in plain}
        absent = [name for name in config.lora_targets if name not in ("all-linear", *linear)]
        if absent:
            experts = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.ndim == 3}
            why = " (matrices of experts take no adapter)" if experts & set(absent) else ""
            raise UserError(
                f"model.lora_targets: {', '.join(absent)} names no linear module of this model{why}; there "
                f"are {', '.join(sorted(linear))}"
            )
        if is_tied(model) and any(
            module is head and name.rsplit(".", 1)[-1] in targets for name, module in model.named_modules()
        ):
            raise UserError(
                "model.lora_targets: the LM head of this model is its embedding (tie_word_embeddings), so an "
                "adapter on it would change both and could be neither saved nor served; leave it out"
            )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft asks transformers for a name that transformers has deprecated
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", ".*_pattern keys did not match", RuntimeWarning)  # of experts
            torch.manual_seed(seed)
            self._wrapper: PeftModel = get_peft_model(model, settings)
        self._model = model

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model without its adapter: the reference policy."""
        with self._wrapper.disable_adapter():
            yield

    def load(self, folder: Path) -> None:
        """Put back the adapter that `save` wrote into a checkpoint."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(
            self._wrapper, load_file(folder / ADAPTER / "adapter_model.safetensors", device="cpu")
        )

    def save(self, folder: Path, *, check: bool = False) -> None:
        """The merged model, which loads without peft, and in `adapter` what peft loads on the base.

        check: open the merged model again; UserError where it is not one with these very weights.
        """
        merged = self.merged_weights()
        save_model(self._model, folder, merged)
        if check:
            check_saved(folder, merged)
        self._wrapper.save_pretrained(
            str(folder / ADAPTER), save_embedding_layers=False, state_dict=weights_of(self._wrapper)
        )

    @torch.no_grad()
    def merged_weights(self) -> dict[str, Tensor]:
        """W + scale B A under the base model's own names; the model itself is left alone."""
        from peft.tuners.lora import Linear

        deltas = {
            f"{name}.base_layer.weight": module
            for name, module in self._model.named_modules()
            if isinstance(module, Linear)
        }
        merged = {}
        for name, tensor in weights_of(self._model).items():
            if "lora_" in name:
                continue
            if name in deltas:
                delta = deltas[name].get_delta_weight("default")
                tensor = (tensor.to(delta.dtype) + delta).to(tensor.dtype)
            merged[name.replace(".base_layer.", ".")] = tensor
        return merged
