"""Deterministic mode, in which SGLang honours a request's sampling_seed, with PyTorch's attention.

SGLang offers it for GPU attention backends; its own extension hooks admit another. The batch-invariant
kernels that it would switch on are Triton's and have no CPU version: what a CPU computes depends on the
batch by rounding, as it does without them.
"""

from __future__ import annotations


def allow_seeds() -> None:
    from sglang.srt import batch_invariant_ops  # pyrefly: ignore
    from sglang.srt.arg_groups.choices import (  # pyrefly: ignore
        add_deterministic_attention_backend_choices,
        add_radix_supported_deterministic_attention_backend_choices,
    )

    add_deterministic_attention_backend_choices(["torch_native"])
    add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda *args, **kwargs: None
