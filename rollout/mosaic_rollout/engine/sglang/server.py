"""A server process of our own: started, watched and killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from mosaic_rollout.engine.sglang.client import ServerRefusedError, ServerUnavailableError, SGLangClient
from mosaic_rollout.engine.stats import EngineError
from mosaic_rollout.errors import UserError

_LAUNCHER = Path(__file__).with_name("server_side") / "launch.py"
_POLL_S = 0.25
_LOG_TAIL_LINES = 12
_OF_A_JOB = ("MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCHELASTIC_")
_OF_A_RANK = ("RANK", "WORLD_SIZE", "ROLE_NAME")  # also LOCAL_RANK, GROUP_WORLD_SIZE and the like


@dataclass(frozen=True)
class ServerOptions:
    """How a server is started. See docs/sglang.md for what each means to SGLang."""

    python: Path  # of the environment SGLang is installed in
    device: Literal["cpu", "cuda"]
    dtype: str  # "float32", "bfloat16"
    context_tokens: int
    max_running_requests: int
    max_cached_tokens: int  # CPU only; on a GPU SGLang fills its share of the memory
    deterministic: bool
    colocated: bool
    seed: int
    startup_timeout_s: float
    hang_timeout_s: float
    more: tuple[str, ...] = ()  # flags of `sglang.launch_server`, passed on as they are
    gpus: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES of each server; empty: all see what this process sees

    def check(self) -> None:
        """UserError where there is no such Python."""
        if not self.python.is_file():
            raise UserError(
                f"engine.python: there is no {self.python}; `make sglang` installs SGLang into .venv-sglang, "
                "or name the Python of an environment that has it"
            )


class ServerProcess:
    """One SGLang server on a loopback port, in a process group of its own; its output goes to a log file."""

    def __init__(self, options: ServerOptions, log_path: Path, index: int) -> None:
        self.options, self.log_path, self._index = options, log_path, index
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id, which is also the id of the process group; None before a start and after a kill."""
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and where it was never started."""
        return self._process.poll() if self._process else None

    async def start(self, model: Path, version: int) -> None:
        """Serve the weights of folder `model` as `version`; returns when the server answers.

        EngineError, with the end of the log, where it exits or does not answer in startup_timeout_s.
        """
        self.kill()
        self.options.check()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = self._spawn(model, version, port, log)
        client = SGLangClient(self.url)
        try:
            await self._until_healthy(client)
        except BaseException:
            self.kill()
            raise
        finally:
            await client.aclose()

    def kill(self) -> None:
        """End the server and all its workers at once, also where they are stopped."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # the whole group is gone already
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin:
            process.stdin.close()

    def log_tail(self) -> str:
        """The last lines of the server's log, for an error message."""
        try:
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(f"    {line[:200]}" for line in lines[-_LOG_TAIL_LINES:])

    async def _until_healthy(self, client: SGLangClient) -> None:
        deadline = time.monotonic() + self.options.startup_timeout_s
        while time.monotonic() < deadline:
            if self.exit_code is not None:
                raise EngineError(
                    f"the SGLang server exited with {self.exit_code} while starting; the end of "
                    f"{self.log_path}:\n{self.log_tail()}"
                )
            try:
                await client.call("/health_generate", timeout_s=max(_POLL_S, deadline - time.monotonic()))
            except (ServerUnavailableError, ServerRefusedError):
                await asyncio.sleep(_POLL_S)
            else:
                return
        raise EngineError(
            f"the SGLang server did not answer within {self.options.startup_timeout_s:g} s "
            f"(engine.startup_timeout_s); the end of {self.log_path}:\n{self.log_tail()}"
        )

    def _spawn(self, model: Path, version: int, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        flags = self._flags(model, version, port)
        log.write(f"\n--- {' '.join(flags)}\n".encode())
        log.flush()
        return subprocess.Popen(
            [str(self.options.python.absolute()), str(_LAUNCHER), *flags],
            stdin=subprocess.PIPE,  # closed by the kernel when this process dies: the server's signal to end
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment(),
            start_new_session=True,
        )

    def _flags(self, model: Path, version: int, port: int) -> list[str]:
        options = self.options
        flags = [
            *("--model-path", str(model.absolute()), "--weight-version", str(version)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", options.dtype, "--context-length", str(options.context_tokens)),
            *("--max-running-requests", str(options.max_running_requests)),
            *("--random-seed", str(options.seed + self._index)),
            "--skip-tokenizer-init",  # token ids in, token ids out
            "--sleep-on-idle",  # else an idle server keeps a core busy
        ]
        if options.deterministic:
            flags.append("--enable-deterministic-inference")
        if options.colocated and options.device == "cuda":
            flags.append("--enable-memory-saver")
        if options.device == "cpu":
            flags += [
                *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
                *("--disable-overlap-schedule", "--disable-cuda-graph", "--grammar-backend", "none"),
                *("--max-total-tokens", str(options.max_cached_tokens), "--chunked-prefill-size", "4096"),
            ]
        return [*flags, *options.more]

    def _environment(self) -> dict[str, str]:
        environment = {
            **{name: value for name, value in os.environ.items() if not _is_torchruns(name)},
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "SGLANG_HEALTH_CHECK_TIMEOUT": str(max(2, round(self.options.hang_timeout_s))),
        }
        environment.pop("PYTHONPATH", None)  # of this environment, not of SGLang's
        if self.options.device == "cpu":
            environment |= {
                "MOSAIC_SGLANG_CPU": "1",
                "MOSAIC_SGLANG_SEEDED": "1" if self.options.deterministic else "0",
                "CUDA_VISIBLE_DEVICES": "",
                "TORCH_COMPILE_DISABLE": "1",
            }
            environment["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS") or "1"
        elif self.options.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.options.gpus[self._index]
        return environment


def _is_torchruns(name: str) -> bool:
    """Whether torchrun tells its ranks by this variable. A server is no rank.

    Given them, PyTorch in the server would look for a store of the launcher's instead of hosting
    its own.
    """
    prefixes = ("", "LOCAL_", "GROUP_", "ROLE_")
    return name.startswith(_OF_A_JOB) or name in {f"{p}{n}" for p in prefixes for n in _OF_A_RANK}


def _free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
