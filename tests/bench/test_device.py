"""What a run on CUDA does, as far as a machine without one shows it: bf16 and its criterion on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import contenders
import pytest
import run
import torch
import torch.nn.functional as F
from agreement import Expected, missing_of
from cases import attention, logprob, preference, scaling, step
from device import CPU, Place, place_of
from measure import Result
from output import not_run
from torch import Tensor
from workloads import Shape, groups_drawn, real_qwen3

HERE = Place(torch.device("cpu"), torch.bfloat16, real=True)
TINY = Shape(64, 128, layers=2, heads=4, key_heads=2, head_size=16, vocabulary=128)


def _model(place: Place, shape: Shape = TINY) -> torch.nn.Module:
    return real_qwen3(place, TINY)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases' sizes for an accelerator, in tiny."""
    monkeypatch.setattr(attention, "REAL_HEADS", (4, 2, 16))
    monkeypatch.setitem(attention.REAL_SHAPES, "attention", (40, 4, 20, True))
    monkeypatch.setitem(logprob.REAL_SHAPES, "logprob", (70, 32, 200))
    monkeypatch.setattr(preference, "REAL_HEAD", (32, 200))
    for name in preference.REAL_SHAPES:
        monkeypatch.setitem(preference.REAL_SHAPES, name, (20, 4, 12))
    monkeypatch.setitem(step.REAL_WORKLOADS, "step", lambda model: groups_drawn(model, 2, 12, 3, 6))
    monkeypatch.setattr(scaling, "_ROLLOUTS", 4)
    monkeypatch.setattr(scaling, "REAL_LENGTHS", {"sharing": 20, "short": 10})
    for case in (step, scaling, preference):
        monkeypatch.setattr(case, "real_qwen3", _model)


CASES = {
    "attention": attention,
    "logprob": logprob,
    "preference": preference,
    "preference:step": preference,
    "step": step,
    "scaling:sharing-60": scaling,
    "scaling:tokens-64": scaling,
}


@pytest.mark.parametrize("name", CASES)
def test_a_case_in_bf16(name: str) -> None:
    """Ours passes the criterion; others' packages, of which none runs here, are listed with the reason."""
    case = CASES[name]
    missing = case.check(name, False, HERE)
    found: Result = case.run(name, False, HERE, missing)
    assert {"ours", "flat"} <= set(found.contenders)
    assert not set(found.contenders) & set(missing)
    assert found.not_run == missing
    expected = {
        "attention": {"varlen", "flash", "flex"},
        "logprob": {"liger", "cce", "cce_exact"},
        "step": {"varlen", "flash", "flat_flash", "packed_flash"},
        "scaling:sharing-60": {"varlen", "flash"},
        "scaling:tokens-64": {"flat_flash", "packed_flash"},
    }
    assert set(missing) == expected.get(name, set())
    for one in ("flash", "liger", "cce", "packed_flash"):
        assert "is not installed: make bench-peers-cuda" in missing.get(
            one, "is not installed: make bench-peers-cuda"
        )


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    longest_queries: int,
    longest_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What PyTorch documents of varlen_attn, a sequence at a time: causal, aligned at the end."""
    assert window_size == (-1, 0)
    outs = []
    for (a, b), (c, d) in zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True):
        assert b - a <= longest_queries
        assert d - c <= longest_keys
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril_((d - c) - (b - a))
        q, k, v = (x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("name", ["attention", "scaling:sharing-60"])
def test_varlen_attention_is_called_right(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In the case of the op and inside the model, where it has the same gradients as the rest."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _varlen)
    missing = CASES[name].check(name, False, HERE)
    assert "varlen" not in missing
    assert "varlen" in CASES[name].run(name, False, HERE, missing).contenders


def test_the_criterion_of_bf16() -> None:
    """What errs no more than plain PyTorch passes; what errs much more, or is no number, does not."""
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    expected = Expected({"d x": exact}, {"d x": exact.bfloat16()})
    expected.check("ours", {"d x": exact.float().bfloat16()})
    for wrong in (exact * 1.02, exact.where(exact < 3, torch.nan), exact[1:]):
        with pytest.raises(AssertionError, match="ours: d x is off by"):
            expected.check("ours", {"d x": wrong})


@pytest.mark.parametrize(("broken", "said"), [("padded_loss", "flat"), ("gather_loss", "gather")])
def test_a_wrong_contender_in_bf16(monkeypatch: pytest.MonkeyPatch, broken: str, said: str) -> None:
    """fp32 is the judge of the flat batch, too."""
    right: Callable[..., torch.Tensor] = getattr(contenders, broken)
    monkeypatch.setattr(contenders, broken, lambda *args, **more: right(*args, **more) * 1.15)
    with pytest.raises(AssertionError, match=rf"{said}: d .* is off by"):
        scaling.check("scaling:sharing-60", False, HERE)


def test_who_may_fail() -> None:
    """Packages of others may; ours may not, and may not run out of memory either."""

    def check(one: str) -> None:
        if one == "no_room":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if one != "cce_exact":
            raise RuntimeError(f"{one} fails\nat length")

    assert missing_of(["flat", "liger", "cce_exact", "no_room"], check) == {
        "liger": "RuntimeError: liger fails",
        "no_room": "out of memory",
    }
    with pytest.raises(RuntimeError, match="chunked fails"):
        missing_of(["liger", "chunked"], check)

    def no_room(one: str) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        missing_of(["ours"], no_room)


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--device tpu: name auto, cpu or cuda"):
        place_of("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place_of("auto") == place_of("cpu") == CPU
    with pytest.raises(ValueError, match="finds no CUDA device here"):
        place_of("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert place_of("cpu") == CPU
    assert place_of("auto") == place_of("cuda") == Place(torch.device("cuda:1"), torch.bfloat16, real=True)
    for name in run.CASES:
        where = run.place_for(name, HERE)
        assert (where == CPU) == (name in ("forest", "rollout", "train"))


def test_cuda_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that only queues is over when the device is; memory counts beyond what was held."""
    calls: list[str] = []
    fake = SimpleNamespace(
        synchronize=lambda device: calls.append("wait"),
        reset_peak_memory_stats=lambda device: calls.append("reset"),
        memory_allocated=lambda device: 2**30,
        max_memory_allocated=lambda device: 3 * 2**30,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    there = Place(torch.device("cuda", 0), torch.bfloat16, real=True)
    assert there.finished(lambda: calls.append("queued") or 2.0)() == 2.0
    assert calls == ["queued", "wait"]
    calls.clear()
    assert there.peak_gib(lambda: calls.append("queued")) == 2.0
    assert calls == ["wait", "reset", "queued", "wait"]


def test_what_cuda_lists() -> None:
    """A package is listed unless a case timed it: with the case's reason, or because no case was to."""
    timing = {"flex": None, "ours": None}
    measured = SimpleNamespace(contenders=timing, not_run={"liger": "liger-kernel is not installed"})
    installed = {"trl": True, "flash_pref": False, "sglang": True}
    found = not_run(installed, quick=False, results={"attention": measured}, cuda=True)  # pyrefly: ignore
    assert found["Liger"] == "liger-kernel is not installed"
    assert found["cut-cross-entropy"] == "no case of this run measures it"
    assert "FlexAttention" not in found
    assert "one GPU" in found["TRL"]


def test_a_variant_without_room_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(name: str, quick: bool, place: Place) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "check", no_room)
    monkeypatch.setattr(logprob, "SHAPES", {"logprob": (40, 8, 50)})
    monkeypatch.setattr(sys, "argv", ["run.py", "attention", "logprob", "--quick"])
    assert run.main() == 0
    said = capsys.readouterr().out
    assert "attention:many_short" in said
    assert "has no room for it" in said
    assert "logprob: took" in said.replace("[2/2] ", "")


def test_nothing_is_left_on_the_cpu() -> None:
    """Every case at once on a device where a tensor of the CPU among others is an error."""
    script = Path(__file__).with_name("other_device.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ran = {line.split()[0] for line in done.stdout.splitlines()}
    assert ran >= {"attention", "logprob", "preference", "preference:step", "step", "scaling:sharing-60"}
