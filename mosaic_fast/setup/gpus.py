"""What a run does with the GPUs here, found out before a model is loaded: backends, servers, hand-over.

A launched server sees the GPUs that are its own and no other. Those of the trainer are shared only where
`engine.colocated` says so, or where there is no other.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import distributions
from math import prod
from pathlib import Path

import torch

from mosaic_fast.config import Config
from mosaic_fast.distributed import World
from mosaic_fast.errors import UserError
from mosaic_fast.setup.model_folder import device_of
from mosaic_kernels import attention, logprob, surrogate
from mosaic_kernels.dispatch import installed

_WAYS = ("tp", "pp", "dp")  # of SGLang's parallelism that take GPUs of their own
_LONG = {"tp": "tensor-parallel", "pp": "pipeline-parallel", "dp": "data-parallel"}
_NCCL_OF = (
    "from importlib.metadata import distributions as d\n"
    "print(next((x.version for x in d() if (x.name or '').startswith('nvidia-nccl-cu')), ''))"
)


def check_backends(config: Config, device: torch.device) -> None:
    """UserError where a backend that is named cannot run on the policy's device."""
    chosen = {
        "model.attention": (config.model.attention, attention.BACKENDS),
        "model.lm_head": (config.model.lm_head, logprob.BACKENDS),
        "loss.backend": (config.loss.backend, surrogate.BACKENDS),
    }
    for key, (name, backends) in chosen.items():
        on = None if name == "auto" else backends[name]
        if on is not None and device.type not in on:
            raise UserError(
                f"{key} = {name!r} runs on {' and '.join(on)}, and the policy is on {device.type}: use 'auto'"
            )
        package = {"triton": "triton", "flash": "flash_attn"}.get(name)
        if package and not installed(package):
            raise UserError(f"{key} = {name!r} needs the package {package}, which is not installed")
    if config.model.attention == "flash" and config.model.dtype != "bfloat16":
        raise UserError(
            f"model.attention = 'flash' computes bfloat16, and model.dtype is {config.model.dtype!r}: set "
            "model.dtype = 'bfloat16', or another backend"
        )


def why_slow(config: Config) -> str | None:
    """A note for the user where a run takes the slow, exact products of fp32 on a GPU."""
    if device_of(config).type != "cuda" or config.model.dtype != "float32":
        return None
    return (
        "model.dtype is float32 on a GPU: products are exact and without tensor cores, several times slower "
        "than with model.dtype = 'bfloat16', which keeps fp32 master weights"
    )


def server_gpus(config: Config, world: World) -> tuple[str, ...]:
    """CUDA_VISIBLE_DEVICES of each server to launch; empty where servers are given, or run on the CPU.

    UserError where there are too few GPUs, or trainer and server could not exchange weights on them.
    """
    engine = config.engine
    launched = engine.kind == "sglang" and not engine.urls and engine.device != "cpu"
    if not launched or not torch.cuda.is_available():
        return ()
    on_gpu, visible = device_of(config).type == "cuda", _visible()
    own = list(range(world.local_size)) if world.size > 1 else [torch.cuda.current_device()]
    shared = [visible[index] for index in own if index < len(visible)] if on_gpu else []
    free = [gpu for gpu in visible if gpu not in shared]
    size, count = _gpus_a_server(engine.args), engine.servers
    order = [*shared, *free] if engine.colocated else [*free, *shared]
    available = len(order) if engine.colocated or count == 1 else len(free)
    if size * count > available:
        beside = "" if engine.colocated or not shared else " beside the trainer's"
        raise UserError(
            f"engine.servers = {count} of {size} GPU{'s' if size > 1 else ''} each need {size * count} "
            f"GPUs{beside}, and there are {available}: lower engine.servers, or name servers elsewhere in "
            "engine.urls"
        )
    placed = [order[size * index : size * (index + 1)] for index in range(count)]
    if on_gpu and engine.weights == "distributed":
        _check_group(config, shared, placed)
    if on_gpu and engine.weights == "tensor":  # a server opens the trainer's memory on the trainer's GPU
        placed = [[*gpus, *(gpu for gpu in shared[:1] if gpu not in gpus)] for gpus in placed]
    return tuple(",".join(gpus) for gpus in placed)


def _check_group(config: Config, shared: Sequence[str], placed: Sequence[Sequence[str]]) -> None:
    """UserError where NCCL would refuse the group of trainer and server."""
    if any(gpu in shared for gpus in placed for gpu in gpus):
        raise UserError(
            "engine.weights = 'distributed': NCCL takes one process a GPU, and trainer and server would "
            f"share GPU {shared[0]}; use 'tensor' or 'disk', or give the server a GPU of its own"
        )
    ours, theirs = _own_nccl(), _nccl_of(Path(config.engine.python))
    if ours and theirs and ours != theirs:
        raise UserError(
            "engine.weights = 'distributed': NCCL refuses a group of different versions, and the trainer has "
            f"{ours}, {config.engine.python} has {theirs}; install the same nvidia-nccl in both, or use "
            "'tensor' or 'disk'"
        )


def _visible() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def _gpus_a_server(args: Sequence[str]) -> int:
    """GPUs that SGLang's own flags ask for, the product of its ways of parallelism."""
    text = " ".join(args).replace("_", "-")
    sizes = []
    for way in _WAYS:
        found = re.findall(rf"--(?:{way}-size|{way}|{_LONG[way]}-size)[ =](\d+)", text)
        sizes.append(int(found[-1]) if found else 1)
    if "--enable-dp-attention" in text:
        sizes.pop()  # its replicas share the GPUs of tensor parallelism
    return max(1, prod(sizes))


def _own_nccl() -> str:
    """Version of the NCCL that this environment's torch loads; "" where no package says."""
    names = (one.version for one in distributions() if (one.name or "").startswith("nvidia-nccl-cu"))
    return next(names, "")


def _nccl_of(python: Path) -> str:
    """The same of another environment, asked without importing torch there."""
    try:
        done = subprocess.run(
            [str(python.absolute()), "-c", _NCCL_OF], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""  # whoever starts the server says what is wrong with it
    return done.stdout.strip()
