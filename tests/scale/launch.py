"""Jobs of several ranks on this machine: torchrun with gloo over loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

PATIENCE_S = 240


def start(ranks: int, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start a module on so many ranks; a free port is the launcher's to find."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*command, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def run(ranks: int, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a job."""
    process = start(ranks, arguments)
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err
