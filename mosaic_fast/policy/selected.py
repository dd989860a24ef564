"""An unmodified transformers model that runs on forests, for the duration of a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from mosaic_fast.policy.attention import ATTENTION_NAME, forest_attention
from mosaic_rollout.engine.recurrent import on_forest, recurrent_modules


@contextmanager
def forest_selected(model: PreTrainedModel) -> Iterator[None]:
    """Select tree attention on the model's configurations, and have its recurrent layers run on forests.

    What was before comes back on exit.

    Gradient checkpointing runs a layer again during the backward pass, when this context is long gone, so
    its checkpoint functions are wrapped for the time of the forward: they select the same themselves.
    """
    AttentionInterface.register(ATTENTION_NAME, forest_attention)
    modules = list(model.modules())
    configs = {
        id(config): config for m in modules if isinstance(config := vars(m).get("config"), PreTrainedConfig)
    }
    checkpointed = [m for m in modules if getattr(m, "gradient_checkpointing", False)]
    functions = [vars(m)["_gradient_checkpointing_func"] for m in checkpointed]
    selected = partial(_selected, list(configs.values()), recurrent_modules(model))
    try:
        for module, function in zip(checkpointed, functions, strict=True):
            vars(module)["_gradient_checkpointing_func"] = _selecting(function, selected)
        with selected():
            yield
    finally:
        for module, function in zip(checkpointed, functions, strict=True):
            vars(module)["_gradient_checkpointing_func"] = function


@contextmanager
def _selected(configs: list[PreTrainedConfig], recurrent: list[nn.Module]) -> Iterator[None]:
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = ATTENTION_NAME
        with on_forest(recurrent):
            yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _selecting(
    checkpoint: Callable[..., object], selected: Callable[[], AbstractContextManager[None]]
) -> Callable[..., object]:
    """A checkpoint function that runs its layer, now and again in the backward pass, on the forest."""

    def selecting_checkpoint(run_layer: Callable[..., object], *args: object) -> object:
        def run(*inputs: object) -> object:
            with selected():
                return run_layer(*inputs)

        return checkpoint(run, *args)

    return selecting_checkpoint
