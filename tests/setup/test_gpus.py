"""What a run finds out about GPUs before it loads anything, on machines that are pretended."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mosaic_kernels
from mosaic_fast.config import Config
from mosaic_fast.distributed import ALONE, World
from mosaic_fast.errors import UserError
from mosaic_fast.losses import LossBatch, build_loss
from mosaic_fast.policy import attention as policy_attention
from mosaic_fast.policy import forward as policy_forward
from mosaic_fast.setup import gpus
from mosaic_fast.setup.build import build_setup
from mosaic_fast.setup.gpus import check_backends, server_gpus, why_slow
from mosaic_fast.setup.model_folder import load_policy, model_folder
from mosaic_kernels import pack_forest
from mosaic_rollout.engine.sglang.server import ServerOptions, ServerProcess

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Four GPUs, the first of them current."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def config(model: Any = None, **engine: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "a-model", "dtype": "bfloat16", **(model or {})},
            "engine": {"kind": "sglang", **engine},
        }
    )


@pytest.mark.parametrize(
    ("engine", "placed"),
    [
        ({}, ("1",)),
        ({"servers": 3}, ("1", "2", "3")),
        ({"servers": 1, "args": ("--tp-size", "3")}, ("1,2,3",)),
        ({"args": ("--tensor-parallel-size=2", "--pp", "2")}, ("1,2,3,0",)),
        ({"args": ("--tp", "2", "--dp", "2", "--enable-dp-attention")}, ("1,2",)),
        ({"servers": 2, "weights": "tensor"}, ("1,0", "2,0")),
        ({"colocated": True}, ("0",)),
        ({"colocated": True, "servers": 2, "weights": "tensor"}, ("0", "1,0")),
        ({"servers": 2, "device": "cpu"}, ()),
        ({"urls": ("http://127.0.0.1:30000",)}, ()),
        ({"kind": "local"}, ()),
    ],
)
def test_each_server_has_gpus_of_its_own(
    engine: dict[str, object], placed: tuple[str, ...], machine: pytest.MonkeyPatch
) -> None:
    assert server_gpus(config(**engine), ALONE) == placed


def test_gpus_are_named_as_this_process_was_told(machine: pytest.MonkeyPatch) -> None:
    """By index or UUID; several ranks have the first ones; a policy on the CPU has none."""
    machine.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,5,7")
    assert server_gpus(config(servers=2), ALONE) == ("GPU-b", "5")
    assert server_gpus(config(servers=2), World(0, 2, 0, local_size=2)) == ("5", "7")
    assert server_gpus(config({"device": "cpu"}, servers=4), ALONE) == ("GPU-a", "GPU-b", "5", "7")
    machine.setattr(torch.cuda, "device_count", lambda: 1)
    assert server_gpus(config(), ALONE) == ("GPU-a",)  # one GPU for both, though not colocated


def test_a_server_is_told_its_gpus(tmp_path: Path) -> None:
    options = ServerOptions(
        tmp_path, "cuda", "bfloat16", 512, 8, 0, False, False, 0, 5.0, 5.0, gpus=("1,0", "2,0")
    )
    for index, expected in enumerate(options.gpus):
        process = ServerProcess(options, tmp_path / "log", index)
        assert process._environment()["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (
            {"servers": 4},
            r"engine.servers = 4 of 1 GPU each need 4 GPUs beside the trainer's, and there are 3",
        ),
        ({"servers": 2, "args": ("--tp", "2")}, r"2 of 2 GPUs each need 4 GPUs beside the trainer's"),
        ({"servers": 5, "colocated": True}, r"need 5 GPUs, and there are 4: lower engine.servers"),
        (
            {"weights": "distributed", "colocated": True},
            r"'distributed': NCCL takes one process a GPU.*share GPU 0; use 'tensor'",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    engine: dict[str, object], said: str, machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        build_setup(config(**engine), tmp_path / "no such model")


def test_other_versions_of_nccl_are_refused_by_name(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 2.30.7\n")
    python.chmod(0o755)
    over_group = config(weights="distributed", python=str(python))
    machine.setattr(gpus, "_own_nccl", lambda: "2.29.7")
    with pytest.raises(UserError, match=r"the trainer has 2\.29\.7, .*python has 2\.30\.7; install the same"):
        server_gpus(over_group, ALONE)
    for version in ("2.30.7", ""):  # the same, or no package that says: then NCCL decides
        machine.setattr(gpus, "_own_nccl", lambda version=version: version)
        assert server_gpus(over_group, ALONE) == ("1",)
    assert server_gpus(config(weights="distributed", python="/no/such/python"), ALONE) == ("1",)


@pytest.mark.parametrize(
    ("model", "device", "said"),
    [
        ({"attention": "triton"}, CPU, r"model\.attention = 'triton' runs on cuda, .* on cpu: use 'auto'"),
        ({"attention": "flash"}, CUDA, r"model\.attention = 'flash' needs the package flash_attn"),
        ({"lm_head": "triton"}, CPU, r"model\.lm_head = 'triton' runs on cuda"),
    ],
)
def test_a_backend_that_cannot_run_is_named(
    model: dict[str, object], device: torch.device, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check_backends(config(model), device)
    for name in ("auto", "reference"):
        check_backends(config({"attention": name, "lm_head": name}), CPU)
    with pytest.raises(UserError, match=r"loss\.backend = 'triton' runs on cuda"):
        check_backends(Config.model_validate({"loss": {"backend": "triton"}}), CPU)


def test_flash_with_fp32_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "installed", lambda package: True)
    check_backends(config({"attention": "flash"}), CUDA)
    with pytest.raises(UserError, match=r"computes bfloat16, and model\.dtype is 'float32'"):
        check_backends(config({"attention": "flash", "dtype": "float32"}), CUDA)


def test_fp32_on_a_gpu_says_that_it_is_slow(machine: pytest.MonkeyPatch) -> None:
    slow = why_slow(config({"dtype": "float32"}))
    assert slow is not None
    assert "model.dtype = 'bfloat16'" in slow
    assert why_slow(config()) is None
    assert why_slow(Config()) is None  # the embedded model stays on the CPU


def test_a_run_computes_by_the_backends_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the configuration to the ops, which are asked by name."""
    asked: list[object] = []

    def noting(module: ModuleType, op: str) -> None:
        computed = getattr(module, op)

        def run(*arguments: Any, **options: Any) -> object:
            asked.append(f"{op}: {options['backend']}")
            return computed(*arguments, **options)

        monkeypatch.setattr(module, op, run)

    noting(policy_attention, "tree_attention")
    noting(policy_forward, "linear_logprob")
    noting(mosaic_kernels, "clipped_surrogate")
    chosen = Config.model_validate(
        {
            "model": {"attention": "reference", "lm_head": "chunked"},
            "loss": {"backend": "reference"},
        }
    )
    policy = load_policy(chosen, model_folder("embedded"))
    logprobs = policy.logprobs(pack_forest([[5, 6, 7], [5, 6, 8]]))
    zeros = torch.zeros_like(logprobs)
    build_loss(chosen.loss)(logprobs, LossBatch(zeros, zeros, zeros, zeros))
    assert set(asked) == {
        "tree_attention: reference",
        "linear_logprob: chunked",
        "clipped_surrogate: reference",
    }
