"""`python -m mosaic_kernels.verify` passes here, and fails when an op is off."""

from typing import Any

import pytest
import torch

from mosaic_kernels import proof, verify


def test_passes_and_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert proof.check_references(forests=2)
    lines = capsys.readouterr().out.splitlines()
    named = {tuple(line.split()[:2]) for line in lines[1:]}
    assert {("tree_attention", "segments"), ("linear_logprob", "chunked")} <= named
    assert all(line.endswith("yes") for line in lines[1:])


def test_fails_with_the_line_of_the_op_that_is_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = proof.tree_attention

    def off(*args: torch.Tensor, **options: Any) -> torch.Tensor:
        return exact(*args, **options) * (1 + 1e-11 * (options["backend"] == "segments"))

    monkeypatch.setattr(proof, "tree_attention", off)
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


def test_a_gradient_written_past_an_input_or_read_from_there_is_found() -> None:
    """Inputs lie between NaNs: reading them shows in the numbers, writing them in the NaNs."""
    guarded = proof.Guarded(torch.arange(6.0).view(2, 3), "cpu", torch.float32)
    assert torch.equal(guarded.leaf, torch.arange(6.0).view(2, 3))
    assert guarded.untouched()
    inside = guarded.leaf.detach()
    beyond = torch.as_strided(inside, (7,), (1,), inside.storage_offset())
    assert beyond[6].isnan()
    beyond[6] = 1.0
    assert not guarded.untouched()


def test_uninitialised_memory_is_poisoned_only_while_an_op_is_checked() -> None:
    with proof.poisoned_memory():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
