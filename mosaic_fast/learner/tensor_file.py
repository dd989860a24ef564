"""Safetensors files written one tensor at a time, and read one slice at a time: never all of it in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mosaic_fast.errors import TrainingError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. `make` is called when its turn comes, on every rank where there are several."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


class Reader(Protocol):
    """An open file: the names in it, and a call that reads rows [start, stop) of a tensor, by default all."""

    names: frozenset[str]

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Tensor: ...


def write_tensors(path: Path | None, entries: Sequence[Entry]) -> None:
    """Write the entries in their order; without a path only make them. OSError where the disk refuses.

    The format: https://huggingface.co/docs/safetensors. Eight bytes with the header's length, the header as
    JSON, the tensors' bytes end to end.
    """
    if path is None:
        for entry in entries:
            entry.make()
        return
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for entry in entries:
        stop = offset + torch.Size(entry.shape).numel() * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.make().detach().cpu().contiguous()
            if tensor.shape != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}, not as announced")
            tensor.reshape(-1).view(torch.uint8).numpy().tofile(file)


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Read from a file while entered. TrainingError where it is missing or damaged."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield _File(file)
    except (SafetensorError, FileNotFoundError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from None


class _Slice(Protocol):
    def __getitem__(self, index: slice) -> Tensor: ...


class _OpenFile(Protocol):
    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def get_slice(self, name: str) -> _Slice: ...


class _File:
    """safetensors' open file as a `Reader`."""

    def __init__(self, file: _OpenFile) -> None:
        self._file, self.names = file, frozenset(file.keys())

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if start == 0 and stop is None:
            return self._file.get_tensor(name)
        return self._file.get_slice(name)[start:stop]
