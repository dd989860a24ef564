"""A checksum of weights, to tell whether the engine serves what was trained."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_checksum(model: nn.Module) -> int:
    """Sum modulo 2**64 of a hash of (name, shape, bytes) of each parameter: any changed bit changes it."""
    total = 0
    for name, parameter in model.named_parameters():
        digest = hashlib.blake2b(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode(), digest_size=8)
        raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
        total += int.from_bytes(digest.digest(), "little")
    return total % (1 << 64)
