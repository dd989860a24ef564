"""A peer's training step as a process of its own, driven over stdin; import it before any other library.

Commands, one a line, each answered by a line:
    load KIND FOLDER       make the step; FOLDER holds the model and the batch's arrays as .npy files
    gradients              write FOLDER/gradients.safetensors; answers with the loss
    step                   forward, backward and AdamW; answers with the seconds
    peak                   forward and backward; answers with the most GiB that PyTorch held (CPU)
Standard output carries answers only: whatever the libraries print goes to standard error.
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

Model = TypeVar("Model", bound=torch.nn.Module)


class PeerStep(ABC, Generic[Model]):
    """A model with its batch."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

    @abstractmethod
    def backward(self) -> float:
        """Add to the gradients; returns the loss."""

    def gradients(self) -> float:
        self.model.zero_grad()
        loss = self.backward()
        named = self.model.named_parameters()
        found = {n: p.grad.cpu().contiguous() for n, p in named if p.grad is not None}
        save_file(found, self.folder / "gradients.safetensors")
        self.model.zero_grad()
        return loss

    def peak_gib(self) -> float:
        sys.path.append(str(Path(__file__).parents[1]))
        from device import CPU

        return CPU.peak_gib(self.backward)

    def step(self) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start


def serve(load: Callable[[str, Path], PeerStep]) -> None:
    """Answer commands until standard input ends. load: of a kind and a folder. argv[1]: CPU threads."""
    torch.set_num_threads(int(sys.argv[1]))
    loaded: PeerStep | None = None
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "load":
            loaded = None  # its memory, before there is another one
            loaded = load(arguments[0], Path(arguments[1]))
            print("loaded", file=_answers, flush=True)
            continue
        assert loaded is not None, f"{command} before load"
        work = {"gradients": loaded.gradients, "step": loaded.step, "peak": loaded.peak_gib}
        print(work[command](), file=_answers, flush=True)
