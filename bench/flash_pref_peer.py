"""flash-pref as a contender: a process in .venv-flash-pref, which `make bench-peers` makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peer import ROOT, Peer, batch_folder
from workloads import Workload

PYTHON = ROOT / ".venv-flash-pref" / "bin" / "python"


def installed() -> bool:
    return (ROOT / ".venv-flash-pref" / ".installed").exists()


@contextmanager
def pairwise(workload: Workload, pairs: np.ndarray, reference: np.ndarray, beta: float) -> Iterator[Peer]:
    """DPO's mean loss, the first of each pair chosen, on the model's device and in its precision.

    All rollouts are one group: what all share is computed once. pairs: [P, 2]; reference: [R] summed
    log-probs.
    """
    device = workload.model.device.type
    with batch_folder(workload, pairs=pairs, reference=reference.astype(np.float32), beta=beta) as folder:
        found = Peer(PYTHON, "flash_pref_step.py", str(torch.get_num_threads()), device)
        try:
            found.load("pairwise", folder)
            yield found
        finally:
            found.end()  # gives back its memory on the device
