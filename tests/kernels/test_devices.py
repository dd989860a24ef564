"""GPUs that are not here, pretended: the second one of a machine, and architectures without tiles."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mosaic_kernels
from mosaic_kernels import attention, clipped_surrogate, logprob, surrogate
from mosaic_kernels.dispatch import Backends, Defaults, _log_choice, choose_backend, launch
from mosaic_kernels.selfcheck import Deviation, run_check

SECOND = torch.device("cuda", 1)
Current = Callable[[], int]


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Current:
    """The index of the current device, a thread's own as CUDA's is: the first one in a new thread."""
    state = threading.local()

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, state.index = getattr(state, "index", 0), wanted.index
        try:
            yield
        finally:
            state.index = before

    monkeypatch.setattr(torch.cuda, "device", device)
    return lambda: getattr(state, "index", 0)


class Kernel:
    """Stands for a Triton kernel, and notes on which device it is launched."""

    def __init__(self, current: Current) -> None:
        self._current, self.launched = current, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self.launched.append((grid, self._current()))


def test_a_self_check_runs_on_the_device_it_checks(current: Current) -> None:
    """In its own thread, whose current device is another one."""
    seen = []

    def check(device: torch.device, variant: Hashable) -> Mapping[str, Deviation]:
        seen.append((device, current()))
        return {"out": Deviation(0.0, 1.0)}

    run_check("op", SECOND, "on the second device", check)
    assert seen == [(SECOND, 1)]


def test_a_kernel_is_launched_on_its_tensors_device(current: Current) -> None:
    kernel = Kernel(current)
    with FakeTensorMode():
        launch(kernel, 7, 3, torch.empty(4, device=SECOND), torch.empty(2), BLOCK=4)
    assert kernel.launched == [((7,), 1)]
    assert current() == 0


def test_an_op_on_a_second_device(current: Current, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss that every run has by default, from the call on."""
    from mosaic_kernels.surrogate import triton

    kernel = Kernel(current)
    monkeypatch.setattr(triton, "surrogate_kernel", kernel)
    monkeypatch.setattr(triton, "check_once", lambda *_: None)
    with FakeTensorMode():
        values = torch.empty(4, 2000, device=SECOND)
        clipped_surrogate(*values, clip_low=0.2, clip_high=0.2)
    assert kernel.launched == [((2,), 1)]


def test_nothing_else_launches_a_kernel() -> None:
    """What is launched past `launch` runs on whatever device is current."""
    for path in Path(mosaic_kernels.__file__).parent.rglob("*.py"):
        found = re.findall(r"\w*kernel\w*\[\(", path.read_text(encoding="utf-8"))
        assert found == (["kernel[("] if path.name == "dispatch.py" else []), path


def chosen(
    op: str, backends: Backends, defaults: Defaults, obstacle: Callable[[str], str] = lambda name: ""
) -> str:
    """What `auto` takes on a GPU; forgets what was logged before."""
    _log_choice.cache_clear()
    return choose_backend(op, "auto", torch.device("cuda"), backends, defaults, obstacle)


@pytest.mark.parametrize(
    ("arch", "head_dim", "expected"),
    [
        ("sm_90", 128, "triton"),
        ("sm_103", 128, "flex"),
        ("sm_121", 64, "flex"),
        ("sm_90", 80, "triton"),
        ("sm_90", 1024, "flex"),
        ("gfx950", 128, "flex"),
        ("sm_75", 64, "reference"),
        ("sm_90", 8, "triton"),
        ("sm_103", 8, "reference"),
    ],
)
def test_attention_without_a_tile_is_computed_by_another_backend_and_says_so(
    arch: str, head_dim: int, expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention, "architecture_of", lambda device: arch)
    q = torch.empty(3, 2, head_dim, dtype=torch.bfloat16)
    found = chosen(
        "tree_attention", attention.BACKENDS, attention.DEFAULTS, lambda name: attention._obstacle(name, q, q)
    )
    assert found == expected
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == (expected != "triton")
    for line in said:
        assert f"tree_attention: backend {expected} on cuda" in line
        assert f"triton: no tile for head size {head_dim} in torch.bfloat16 on {arch}" in line


def test_the_head_without_a_tile_is_chunked_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.empty(3, 8, dtype=torch.bfloat16)
    for arch, expected in (("sm_100", "triton"), ("sm_103", "chunked"), ("gfx90a", "chunked")):
        monkeypatch.setattr(logprob, "architecture_of", lambda device, arch=arch: arch)
        caplog.clear()
        found = chosen(
            "linear_logprob", logprob.BACKENDS, logprob.DEFAULTS, lambda name: logprob._obstacle(name, x, x)
        )
        assert found == expected
        assert (f"no tile for torch.bfloat16 on {arch}" in caplog.text) == (expected == "chunked")


def test_without_triton_everything_still_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mosaic_kernels.dispatch.installed", lambda package: False)
    assert chosen("clipped_surrogate", surrogate.BACKENDS, surrogate.DEFAULTS) == "reference"
    assert "the package triton is not installed" in caplog.text
    with pytest.raises(ValueError, match="needs the package triton"):
        choose_backend("op", "triton", torch.device("cuda"), surrogate.BACKENDS, surrogate.DEFAULTS)
