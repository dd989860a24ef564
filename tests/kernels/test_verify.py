"""`python -m mosaic_kernels.verify` passes here, and fails when an op is off."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mosaic_kernels import verify
from mosaic_kernels.proof import references


def test_passes_and_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert references.check_references(forests=2)
    lines = capsys.readouterr().out.splitlines()
    named = {tuple(line.split()[:2]) for line in lines[1:]}
    assert {("tree_attention", "segments"), ("linear_logprob", "chunked")} <= named
    assert all(line.endswith("yes") for line in lines[1:])


def test_fails_with_the_line_of_the_op_that_is_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = references.tree_attention

    def off(*args: torch.Tensor, **options: Any) -> torch.Tensor:
        return exact(*args, **options) * (1 + 1e-11 * (options["backend"] == "segments"))

    monkeypatch.setattr(references, "tree_attention", off)
    monkeypatch.setattr("sys.argv", ["verify", "--layer", "references", "--forests", "1"])
    with pytest.raises(SystemExit, match="references failed"):
        verify.main()
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.endswith("NO")]
    assert [line.split()[:4] for line in wrong] == [["tree_attention", "segments", "cpu", "float64"]]


def test_a_layer_that_cannot_run_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by name it is a failure, with what is missing in the output."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["verify", "--layer", "device"])
    with pytest.raises(SystemExit, match="device cannot run here"):
        verify.main()
    assert "== device: not run, needs a CUDA device" in capsys.readouterr().out


def test_tests_of_a_layer_run_with_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton reads TRITON_INTERPRET at import, so each layer is a process; its failure is the layer's."""
    seen = []

    def run(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        seen.append((command[2:], env.get("TRITON_INTERPRET"), env.get("MOSAIC_EMULATED")))
        return SimpleNamespace(returncode=int("ttsem.sanitize" in command))

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # what the caller has set must not leak into ttsem
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("sys.argv", ["verify", "--layer", "interpreter", "--layer", "ttsem"])
    with pytest.raises(SystemExit, match="ttsem failed"):
        verify.main()
    (interpreter, *flags), (ttsem, *ttsem_flags) = seen
    assert interpreter[0] == "pytest"
    assert flags == ["1", None]
    assert ttsem[:2] == ["ttsem.sanitize", "pytest"]
    assert ttsem_flags == [None, "1"]


def test_compiling_beside_the_tests_reports_its_failure_and_its_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timings come last, when nothing else runs."""
    ran: list[str] = []

    def layer(name: str) -> verify.Layer:
        return verify.Layer(lambda: "", lambda options: ran.append(name) is None)

    def run(command: list[str], **options: Any) -> Any:
        assert command[3:] == ["--layer", "compile", "--arch", "sm_90"]
        return SimpleNamespace(returncode=1, stdout="sm_90 spills\n")

    monkeypatch.setattr(verify, "LAYERS", {name: layer(name) for name in ("compile", "device", "work")})
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("sys.argv", ["verify", "--arch", "sm_90"])
    with pytest.raises(SystemExit, match="verify: compile failed"):
        verify.main()
    assert ran == ["work", "device"]
    lines = capsys.readouterr().out.splitlines()
    assert lines.index("sm_90 spills") < lines.index("== device")
