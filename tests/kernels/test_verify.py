"""`python -m mosaic_kernels.verify` passes here, and fails when an op is off."""

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
