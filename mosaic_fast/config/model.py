"""[model]: the policy and its adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mosaic_fast.config.section import Count, CountOrZero, Section


class ModelConfig(Section):
    """The policy."""

    path: str = "embedded"
    """Folder of a Hugging Face causal LM (Qwen2, Qwen3, Phi-3/Phi-4, Llama); `embedded`: the one shipped."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations. bfloat16 is meant for GPUs; on a CPU it is much slower."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy lives; auto takes a GPU where there is one, except for the embedded model."""
    threads: CountOrZero = 1
    """CPU threads of PyTorch; 0: PyTorch's own choice. More than there are idle cores slow a run badly."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and run the layer again in the backward pass: less memory, more time."""
    lora_rank: CountOrZero = 0
    """Train low-rank adapters of this rank (needs peft: the extra `lora`); 0: train every weight."""
    lora_alpha: Count | None = None
    """LoRA: adapters are scaled by lora_alpha / lora_rank; default twice the rank."""
    lora_targets: Annotated[tuple[str, ...], Field(strict=False)] = ("all-linear",)
    """LoRA: names of the modules that get an adapter, such as q_proj; `all-linear`: all but the LM head."""
