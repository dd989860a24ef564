"""What `mosaic_kernels.verify` asks of a GPU, in small, for whatever executes the kernels here."""

import pytest
import torch

from mosaic_kernels import proof
from tests.kernels.triton.machine import machine

SIZES = proof.Sizes(longest=8, vocab=40, heads=((2, 1, 32),))


def check() -> bool:
    return proof.check_device(1, str(machine().device), machine().dtypes, SIZES)


def test_every_op_passes_in_every_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert check()
    lines = capsys.readouterr().out.splitlines()[1:]
    dtypes = {str(dtype).removeprefix("torch.") for dtype in machine().dtypes}
    ops = {"tree_attention", "linear_logprob", "forest_preference_loss"}
    wanted = {(op, dtype) for op in ops for dtype in dtypes}
    wanted |= {(op, "float32") for op in ("pairwise_preference_loss", "clipped_surrogate")}
    assert {(line.split()[0], line.split()[3]) for line in lines} == wanted
    assert all(line.endswith("yes") for line in lines)


def test_an_op_that_is_off_or_has_no_kernel_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape without a tile is named; an op without any is a failure, as wrong numbers are."""

    def refuses(*args: object, **options: object) -> torch.Tensor:
        raise ValueError("linear_logprob: no tile for this device")

    def off(*args: torch.Tensor, **options: object) -> torch.Tensor:
        return args[0] * 1.001

    two = [one for one in proof.problems(0, SIZES) if one.op in ("linear_logprob", "clipped_surrogate")]
    monkeypatch.setattr(proof, "problems", lambda *_: iter(two))
    monkeypatch.setattr(proof, "linear_logprob", refuses)
    monkeypatch.setattr(proof, "clipped_surrogate", off)
    assert not check()
    out = capsys.readouterr().out
    assert "not run: linear_logprob: no tile for this device" in out
    assert "linear_logprob: has no kernel for this device in any dtype" in out
    assert [line.split()[0] for line in out.splitlines() if line.endswith("NO")] == ["clipped_surrogate"]
