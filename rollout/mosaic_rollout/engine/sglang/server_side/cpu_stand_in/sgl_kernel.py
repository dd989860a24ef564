"""PyTorch versions of the two functions of `sgl_kernel` that a dense model calls on a CPU without AMX.

Every other name of the package raises NotImplementedError when it is called: nothing is passed over.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable

import torch

_LOW_32 = 0xFFFFFFFF
_library: list[torch.library.Library] = []  # an operator lives as long as the library that defined it


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (32 bits) of (seed, position, column), [N, C] uint32.

    seed [N] uint64, positions [N], columns [C]: the words hashed are the seed's low and high half, the
    position and the column. 32-bit arithmetic is done in int64, where PyTorch has all operations.
    """
    wide = seed.to(torch.int64)
    state = torch.zeros_like(wide)
    for word in (wide & _LOW_32, (wide >> 32) & _LOW_32, positions.to(torch.int64) & _LOW_32):
        state = _mix(state, word)
    state = _mix(state[:, None], (columns.to(torch.int64) & _LOW_32)[None, :])
    state = state ^ 16  # bytes hashed
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    return (state ^ (state >> 16)).to(torch.uint32)


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _times(_rotate(_times(word, 0xCC9E2D51), 15), 0x1B873593)
    return (_times(_rotate(state ^ word, 13), 5) + 0xE6546B64) & _LOW_32


def _rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _LOW_32


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x * factor modulo 2**32, without leaving int64."""
    return (((x & 0xFFFF) * factor) + ((((x >> 16) * factor) & 0xFFFF) << 16)) & _LOW_32


def assign_req_to_token_pool_cpu(
    request_indices: torch.Tensor,  # [B]
    request_to_token: torch.Tensor,  # [requests, longest], changed in place
    starts: torch.Tensor,  # [B]
    ends: torch.Tensor,  # [B]
    cache_slots: torch.Tensor,  # [sum(ends - starts)]
    row_length: int,
) -> None:
    """Write each request's new cache slots into its row of the table."""
    offset = 0
    for row, start, end in zip(request_indices.tolist(), starts.tolist(), ends.tolist(), strict=True):
        new = cache_slots[offset : offset + end - start]
        request_to_token[row, start:end] = new.to(request_to_token.dtype)
        offset += end - start


class _Kernels(types.ModuleType):
    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"sgl_kernel.{name} has no stand-in for a machine without a GPU")

        missing.__name__ = name
        return missing


def install_sgl_kernel() -> None:
    module = _Kernels("sgl_kernel")
    module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    module.__dict__.update(__version__="0.0.0+cpu", assign_req_to_token_pool_cpu=assign_req_to_token_pool_cpu)
    sys.modules["sgl_kernel"] = module
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    _library.append(library)
