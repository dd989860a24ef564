"""[engine]: what samples the rollouts, in process or on servers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mosaic_fast.config.section import Count, CountOrZero, Positive, Section

_NO_KEY = "no key belongs in a configuration, and a server on 127.0.0.1 needs none"
_NOT_FOR_SERVERS = {  # flag of sglang.launch_server -> why it is refused, without its value
    "--host": "--host cannot be set, servers launched here listen on 127.0.0.1 alone; for others start one "
    "yourself and name it in engine.urls",
    "--api-key": _NO_KEY,
    "--admin-api-key": _NO_KEY,
    "--trust-remote-code": "--trust-remote-code cannot be set, code in a model's folder is never run",
    "--config": "--config cannot be set, its file could hold any of the flags that are refused here; name "
    "the flags themselves",
}


class EngineConfig(Section):
    """What samples the rollouts."""

    kind: Literal["local", "sglang"] = "local"
    """`local`: in process, PyTorch, with a radix-tree cache. `sglang`: SGLang servers (docs/sglang.md)."""
    max_batch: Count = 96
    """Sequences decoded at once (sglang: by each server)."""
    max_cached_tokens: Count = 200_000
    """Tokens the prefix cache may hold, the least recently used go first (sglang: CPU servers only)."""
    python: str = ".venv-sglang/bin/python"
    """sglang: Python of the environment to launch servers with; `make sglang` makes this one."""
    urls: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """sglang: servers that run already, instead of launching any; they must see the run folder's files."""
    servers: Count = 1
    """sglang: servers to launch; a task's rollouts all go to one of them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """sglang: where launched servers run; auto takes a GPU where PyTorch finds one."""
    args: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """sglang: further flags for launched servers, as `sglang.launch_server` takes them."""
    deterministic: bool = False
    """sglang: SGLang's deterministic mode, with draws keyed by seed, rollout and position."""
    weights: Literal["disk", "tensor", "distributed"] = "disk"
    """sglang: how updated weights reach servers: a folder; memory shared on one machine; a process group."""
    verify_weights: bool = False
    """sglang: prove by checksums after every update that the servers have the trained weights."""
    colocated: bool = False
    """sglang: servers give their memory back while the trainer computes, for one GPU that does both."""
    max_inflight_tokens: CountOrZero = 0
    """sglang: tokens asked of a server at once, prompt to compute and to sample; 0: what its cache holds."""
    request_timeout_s: Positive = 600.0
    """sglang: seconds a request may take before it is sent again."""
    hang_timeout_s: Positive = 60.0
    """sglang: seconds without any sign of life after which a launched server is killed and started anew."""
    startup_timeout_s: Positive = 600.0
    """sglang: seconds a server may take to start."""

    @model_validator(mode="after")
    def _servers_stay_private(self) -> EngineConfig:
        """A server takes whatever weights it is told to load, from anybody who can reach it."""
        for flag in self.args:
            name = flag.partition("=")[0].replace("_", "-")
            for long, why in _NOT_FOR_SERVERS.items():  # argparse takes abbreviations, the last one of a flag
                if len(name) > 3 and long.startswith(name):
                    raise ValueError(f"engine.args: {why}")
        return self
