"""Trainers of others as contenders: each a process with an environment of its own, driven over pipes."""

from __future__ import annotations

import atexit
import importlib.util
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np
from agreement import Expected, Missing
from safetensors.torch import load_file
from torch import Tensor
from workloads import Workload

from mosaic_fast.policy.checkpoint import save_model

ROOT = Path(__file__).parent.parent


class PeerError(RuntimeError):
    """The peer's process ended early; holds the end of what it said."""


class Peer:
    """A peer's process, with one batch loaded at a time. It waits while others are timed.

    The script answers each line of standard input by one line: `load KIND FOLDER`, `gradients`, which writes
    them to the folder, `step`, the seconds of one, and `peak`, the memory of one.
    """

    def __init__(self, python: Path, script: str, *arguments: str) -> None:
        self._script = script
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"{script}-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).parent / "peers" / script), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self._folder = Path()
        atexit.register(self.end)

    def load(self, kind: str, folder: Path) -> None:
        self._folder = folder
        self._ask(f"load {kind} {folder}")

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the peer's loss, as "d <name>" of each parameter."""
        self._ask("gradients")
        found = load_file(self._folder / "gradients.safetensors")
        return {f"d {name}": gradient for name, gradient in found.items()}

    def step(self) -> float:
        """One forward, backward and AdamW; the seconds it took in its own process."""
        return float(self._ask("step"))

    def peak_gib(self) -> float:
        """Most memory that PyTorch holds in a forward and backward pass, beyond what it held before."""
        return float(self._ask("peak"))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ask(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            said = Path(self._log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise PeerError(f"{self._script} ended: " + "\n".join(said[-3:]))
        return answer.strip()


def join(
    name: str,
    contenders: dict[str, Callable[[], object]],
    stack: ExitStack,  # the batch stays loaded until it is left
    loaded: AbstractContextManager[Peer],
    expected: Expected,  # gradients
) -> Missing:
    """Make the peer's step a contender; returns {name: why} where it does not run here.

    AssertionError if its gradients are not the expected ones.
    """
    try:
        peer = stack.enter_context(loaded)
        found = peer.gradients()
    except PeerError as error:
        return {name: str(error)}
    expected.check(name, found)
    contenders[name] = peer.step
    return {}


@contextmanager
def batch_folder(workload: Workload, **arrays: np.ndarray | float) -> Iterator[Path]:
    """Model and batch as a folder that peers' scripts read."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(workload.model, folder)
        for key, value in {
            "tokens": np.concatenate(workload.sequences),
            "trained": np.concatenate(workload.trained),
            "cu_seqlens": np.cumsum([0, *(len(s) for s in workload.sequences)]),
            **arrays,
        }.items():
            np.save(folder / f"{key}.npy", value)
        yield folder


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
