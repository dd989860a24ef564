"""Packages of others that contenders need: imported only where they are installed."""

from __future__ import annotations

import importlib.util

_NEEDED = {  # contender -> package, how it is imported
    "flash": ("flash-attn", "flash_attn"),
    "flat_flash": ("flash-attn", "flash_attn"),
    "packed_flash": ("flash-attn", "flash_attn"),
    "varlen": ("a PyTorch that has it", "torch.nn.attention.varlen"),
    "liger": ("liger-kernel", "liger_kernel"),
    "cce": ("cut-cross-entropy", "cut_cross_entropy"),
    "cce_exact": ("cut-cross-entropy", "cut_cross_entropy"),
}


def package_missing(contender: str) -> str | None:
    """Why a contender's package is not there; None where it is, or none is needed."""
    if contender not in _NEEDED:
        return None
    package, module = _NEEDED[contender]
    if importlib.util.find_spec(module) is not None:
        return None
    return f"{package} is not installed: make bench-peers-cuda"
