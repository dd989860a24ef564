"""Jobs of several ranks on this machine, with gloo over loopback: by torchrun, or forked."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

PATIENCE_S = 600
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
_PRELOADED = ("tests.distributed.gradient_job", "mosaic_fast.train")


def start(ranks: int, arguments: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """Start a module on so many ranks; a free port is the launcher's to find."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*command, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **_ENVIRONMENT, **environment},
    )


def run(ranks: int, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a job under torchrun."""
    process = start(ranks, arguments)
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def run_forked(
    ranks: int, logs: Path, work: Callable[..., object], *arguments: object
) -> list[tuple[int | None, str]]:
    """Call a function on so many ranks, none of which has to import anything: that is most of a short job.

    Exit code and log of each rank; 1 where the function returns something that is true.
    """
    with forked(ranks, logs, work, *arguments) as processes:
        for process in processes:
            process.join(PATIENCE_S)
        return [(one.exitcode, log_of(logs, rank).read_text()) for rank, one in enumerate(processes)]


@contextmanager
def forked(
    ranks: int, logs: Path, work: Callable[..., object], *arguments: object, **environment: str
) -> Iterator[list[BaseProcess]]:
    """The processes of `run_forked` while they run, by rank; what still runs at the end is killed."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(list(_PRELOADED))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun hosts it, too
    processes: list[BaseProcess] = [
        forks.Process(
            target=_rank,
            args=(rank, ranks, store.port, log_of(logs, rank), work, arguments, environment),
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()


def log_of(logs: Path, rank: int) -> Path:
    """What a forked rank prints, to either stream."""
    return logs / f"rank-{rank}.log"


def _rank(
    rank: int,
    ranks: int,
    port: int,
    log: Path,
    work: Callable[..., object],
    arguments: Sequence[object],
    environment: dict[str, str],
) -> None:
    """What torchrun sets for a rank, and the work."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= _ENVIRONMENT | {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
        **environment,
    }
    if work(*arguments):
        sys.exit(1)
