"""`python -m tools.verify_kernels`: what its layers run, and what becomes of their failures."""

from types import SimpleNamespace
from typing import Any

import pytest

from mosaic_kernels.verify import Layer
from tools.verify_kernels import __main__ as verify


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

    def layer(name: str) -> Layer:
        return Layer(lambda: "", lambda options: ran.append(name) is None)

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
