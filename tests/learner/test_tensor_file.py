"""Safetensors files written tensor by tensor: what the library reads, and slices of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mosaic_fast.errors import TrainingError
from mosaic_fast.learner.tensor_file import Entry, reading, write_tensors

TENSORS = {
    "fp32": torch.arange(15.0).reshape(5, 3),
    "transposed": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).t(),  # not contiguous
    "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(7),
    "bytes": torch.arange(3, dtype=torch.uint8),
}


def entries() -> list[Entry]:
    return [Entry(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in TENSORS.items()]


def test_the_library_reads_what_was_written(tmp_path: Path):
    write_tensors(tmp_path / "file", entries())
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_reader_gives_rows(tmp_path: Path):
    write_tensors(tmp_path / "file", entries())
    with reading(tmp_path / "file") as read:
        assert read.names == TENSORS.keys()
        assert torch.equal(read("fp32", 2, 4), TENSORS["fp32"][2:4])
        assert read("fp32", 5, 5).shape == (0, 3)  # a rank without rows
        assert torch.equal(read("scalar"), TENSORS["scalar"])


def test_without_a_path_every_tensor_is_made():
    made: list[str] = []

    def make(name: str) -> torch.Tensor:
        made.append(name)
        return TENSORS[name]

    write_tensors(None, [replace(entry, make=partial(make, entry.name)) for entry in entries()])
    assert made == list(TENSORS)


def test_a_damaged_file_is_named(tmp_path: Path):
    write_tensors(tmp_path / "file", entries())
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:40])
    with pytest.raises(TrainingError, match="file cannot be read"), reading(tmp_path / "file"):
        pass
    with pytest.raises(ValueError, match="not as announced"):
        write_tensors(tmp_path / "other", [Entry("a", (2,), torch.float32, lambda: torch.zeros(3))])
