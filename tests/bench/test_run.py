"""The command: names, mistakes, results files, charts, where time goes."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import charts
import dojo_rollouts
import measure
import pytest
import run
import torch
import trl_peer
from agreement import Expected
from cases import attention, logprob, preference, rollout, scaling, step, train
from device import Place
from machine import Roofline, machine, measure_roofline
from measure import Result, compare
from output import Report, load_results, not_run, write_json, write_markdown
from peer import PeerError
from profiling import profile_step
from rich.console import Console
from workloads import drawn, qwen3


def test_names() -> None:
    assert run.variants_of("step", quick=True) == ["step"]
    assert run.variants_of("step:agent", quick=False) == ["step:agent"]
    assert set(run.variants_of("step:all", quick=False)) == set(step.WORKLOADS)
    assert len(run.variants_of("scaling:sharing", quick=False)) == 7
    for nothing in ("steps", "step:agents", "scaling:shar", ""):
        assert run.variants_of(nothing, quick=False) == []
    assert run.variants_of("step:agentdojo", quick=False) == ["step:agentdojo"]
    assert not any("agentdojo" in name for name in run.variants_of("step", quick=False))
    for name in run.ALL_CASES:
        case = run.load_case(name)
        assert set(run.variants_of(name, quick=False)) <= set(case.VARIANTS)
        assert set(run.variants_of(name, quick=True)) <= set(case.VARIANTS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nothing"], "no case nothing; there are forest, attention"),
        (["forest", "--json", "results.txt"], "ends in .json"),
        (["forest", "--json", "no/where.json"], "there is no folder no"),
        (["trl", "--quick"], "trl has nothing for --quick"),
        (["forest", "--threads", "0"], "--threads 0: this machine has"),
        (["forest", "--profile"], "--profile is of variants of step"),
    ],
)
def test_mistakes(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    assert run.main() == 2
    assert said in capsys.readouterr().err


def test_an_unknown_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--fast"])
    with pytest.raises(SystemExit) as stopped:
        run.main()
    assert stopped.value.code == 2
    assert "--fast" in capsys.readouterr().err


def test_a_red_case_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(logprob.SHAPES, "logprob", (40, 8, 50))
    monkeypatch.setitem(
        logprob.CONTENDERS, "ours", lambda *x: tuple(one + 1 for one in logprob.full(*x))  # pyrefly: ignore
    )  # fmt: skip
    monkeypatch.setattr(logprob, "run", lambda *x: pytest.fail("timed"))
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "logprob", "--quick", "--json", str(file)])
    assert run.main() == 1
    assert "WRONG, not timed: ours: log-probs" in capsys.readouterr().out
    assert not file.exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt, MemoryError])
def test_what_was_measured_before_the_end_is_written(
    end: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """After Ctrl-C with table and charts; after what ends the process at once, the figures."""

    def ended(name: str, quick: bool, place: Place) -> None:
        raise end

    monkeypatch.setitem(logprob.SHAPES, "logprob", (40, 8, 50))
    monkeypatch.setattr(logprob, "QUICK", ("logprob",))
    monkeypatch.setattr(attention, "check", ended)
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "logprob", "attention", "--quick", "--json", str(file)])
    if end is KeyboardInterrupt:
        assert run.main() == 130
        assert "1 of 2 were measured" in capsys.readouterr().out
        assert file.with_suffix(".md").exists()
    else:
        with pytest.raises(MemoryError):
            run.main()
    assert set(json.loads(file.read_text())["cases"]) == {"logprob"}


def test_what_is_not_installed_is_listed_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A variant that cannot run is no traceback, and the others are measured all the same."""
    monkeypatch.setattr(dojo_rollouts, "KEPT", tmp_path)
    monkeypatch.setattr(dojo_rollouts, "MODEL", dojo_rollouts.ROOT / "models" / "none")
    monkeypatch.setitem(logprob.SHAPES, "logprob", (40, 8, 50))
    monkeypatch.setattr(logprob, "QUICK", ("logprob",))
    file = tmp_path / "found.json"
    options = ["--quick", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["run.py", "step:agentdojo", "logprob", *options])
    assert run.main() == 0
    assert "step:agentdojo: not run: " in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert set(found["cases"]) == {"logprob"}
    assert "make bench-agentdojo" in found["not_run"]["step:agentdojo"]
    monkeypatch.setattr(sys, "argv", ["run.py", "step:agentdojo", *options])
    assert run.main() == 1
    monkeypatch.setattr(sys, "argv", ["run.py", "step:agentdojo", "--profile", *options])
    assert run.main() == 1
    assert "make bench-agentdojo" in capsys.readouterr().err


def test_a_run_writes_json_markdown_and_charts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(logprob.SHAPES, "logprob", (40, 8, 50))
    monkeypatch.setattr(logprob, "QUICK", ("logprob",))
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "logprob", "--quick", "--json", str(file)])
    assert run.main() == 0
    found = json.loads(file.read_text())
    assert set(found) == {"machine", "versions", "commit", "rooflines", "cases", "not_run"}
    assert found["machine"]["threads"] >= 1
    assert {"torch", "transformers", "python"} <= set(found["versions"])
    assert found["rooflines"]["cpu"]["gemm_gflop_per_s"] > 1
    assert found["rooflines"]["cpu"]["copy_gb_per_s"] > 0.1
    case = found["cases"]["logprob"]
    assert case["median_s"] == case["contenders"]["ours"]["median_s"] > 0
    assert case["ratio_to_flat"] == pytest.approx(case["flat_median_s"] / case["median_s"])
    assert case["extra"]["flat_peak_gib"] * 2**30 > 40 * 50 * 4
    assert case["formula"]
    assert {"Liger", "cut-cross-entropy", "flash-pref", "TRL"} <= set(found["not_run"])
    text = file.with_suffix(".md").read_text()
    assert "| logprob |" in text
    assert "not run: Liger" in text
    assert "logprob: timing" in capsys.readouterr().out


def test_every_case_runs_quickly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Check, timing and table of every case, at sizes that take no time."""
    tiny = drawn(12, 4, 6, fork_halfway=True, model=qwen3(2, 128, 128))
    small_agents = rollout._groups(2, 2)
    monkeypatch.setitem(attention.SHAPES, "attention:many_short", (20, 4, 8, True))
    monkeypatch.setitem(logprob.SHAPES, "logprob", (40, 8, 50))
    monkeypatch.setattr(preference, "workload", lambda name, place: tiny)
    monkeypatch.setitem(step.WORKLOADS, "step", lambda: tiny)
    monkeypatch.setattr(scaling, "workload", lambda name, place: tiny)
    monkeypatch.setitem(rollout.WORKLOADS, "rollout", lambda: small_agents)
    monkeypatch.setattr(rollout, "_recorded", lambda branching, tasks: small_agents)
    monkeypatch.setattr(
        train, "OPTIONS", (*train.OPTIONS, "--rollout.prompts-per-step", "2", "--rollout.group-size", "2")
    )
    monkeypatch.setattr(train, "start_up", lambda warm: {"imports_s": 1.0, "first_step_more_s": 0.5 * warm})
    file = tmp_path / "all.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--json", str(file)])
    assert run.main() == 0
    said = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert {name.partition(":")[0] for name in found["cases"]} == set(run.CASES)
    assert all(case["median_s"] > 0 for case in found["cases"].values())
    assert "[8/8] scaling:suffix-8: took" in said
    assert "cost of the flat batch / cost of the forest" in said
    assert "start-up of a new process, not in these shares: imports 1.00 s, first step more" in said
    extra = found["cases"]["train"]["extra"]
    assert sum(extra[f"{part}_frac"] for part in train.PARTS) == pytest.approx(1.0)
    assert found["cases"]["forest"]["extra"]["tokens_per_s"] > 0


def _result(ratio: float, sharing: float) -> Result:
    contenders = {"ours": measure.Timing(1.0, 0.0), "flat": measure.Timing(ratio, 0.0)}
    contenders["trl"] = measure.Timing(2 * ratio, 0.1)
    extra = {"raw_tokens": 10.0, "unique_tokens": 5.0, "sharing_frac": sharing}
    return Result(1.0, 0.0, ratio, ratio, ratio, 1.0, extra, contenders)


def test_charts_are_drawn_from_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    results = {f"scaling:sharing-{n}": _result(1 + n / 10, n / 100) for n in (0, 50, 90)}
    results["train"] = Result(1.0, 0.0, math.nan, 0.9, 1.0, 0.9, {"raw_tokens": 2.0, "unique_tokens": 1.0})
    assert [path.name for path in charts.draw_charts(results, "here", tmp_path, "points")] == [
        "points-sharing.svg",
        "points-sharing.png",
    ]
    results["step"] = _result(3.0, 0.0)
    report = Report(results, dict.fromkeys(results, "f"), {"cpu": Roofline(1, 1.0, 1.0)}, {})
    file = tmp_path / "all.json"
    write_json(report, file)
    assert json.loads(file.read_text())["cases"]["train"]["flat_median_s"] is None
    loaded, about = load_results(file)
    assert loaded["scaling:sharing-50"] == results["scaling:sharing-50"]
    assert str(machine()["cpu"]) in about
    monkeypatch.setattr(sys, "argv", ["charts.py", str(file), str(tmp_path)])
    assert charts.main() == 0
    for name in ("all-sharing", "all-cases"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        drawn_text = (tmp_path / f"{name}.svg").read_text()
        assert "<svg" in drawn_text
    write_markdown(report, tmp_path / "all.md")
    assert "| scaling:sharing-90 | trl | 20000.0 ms |" in (tmp_path / "all.md").read_text()
    monkeypatch.setattr(sys, "argv", ["charts.py", str(tmp_path / "no.json"), str(tmp_path)])
    assert charts.main() == 2
    assert "both of which exist" in capsys.readouterr().err


def test_contenders_take_turns_and_may_time_themselves() -> None:
    """Those that return seconds. A short one has a turn after each other, once its time is known."""
    turns: list[str] = []

    def contender(name: str, seconds: float) -> Callable[[], float]:
        return lambda: turns.append(name) or seconds

    work = {name: contender(name, 2.5 + index) for index, name in enumerate(("ours", "flat", "trl"))}
    found = compare(work, repeats=2, ideal=1.0, extra={})
    assert turns == ["ours", "flat", "trl"] * 2 + ["flat", "trl", "ours"]  # the first round is not timed
    assert found.contenders["trl"].median_s == 4.5
    assert found.extra["trl_median_s"] == 4.5
    turns.clear()
    work["ours"] = contender("ours", 1.0)
    compare(work, repeats=3, ideal=1.0, extra={}, warm=False)
    assert turns == [
        "ours",
        "flat",
        "trl",
        *["flat", "ours", "trl", "ours"],
        *["trl", "ours", "flat", "ours"],
    ]


def test_rounds_end_when_the_time_is_up() -> None:
    work = {"ours": lambda: 1.0, "flat": lambda: time.sleep(0.01) or 2.0}
    assert compare(work, repeats=9, ideal=1.0, extra={}, budget_s=0.0).extra["rounds"] == measure.FEWEST
    assert compare(work, repeats=3, ideal=1.0, extra={}, budget_s=60.0).extra["rounds"] == 3


def test_a_peer_that_cannot_run_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Expected({"d weight": torch.ones(2)})

    @contextmanager
    def loaded(scale: float) -> Iterator[SimpleNamespace]:
        if not scale:
            raise PeerError("trl_step.py ended: no memory")
        yield SimpleNamespace(gradients=lambda: {"d weight": scale * torch.ones(2)}, step=lambda: 2.0)

    def joined(scale: float) -> tuple[dict[str, str], list[str]]:
        contenders: dict[str, Callable[[], object]] = {}
        with ExitStack() as stack:
            missing = trl_peer.join(contenders, stack, loaded(scale), expected)  # pyrefly: ignore
        return missing, list(contenders)

    monkeypatch.setattr(trl_peer, "installed", lambda: False)
    assert joined(1.0) == ({}, [])
    monkeypatch.setattr(trl_peer, "installed", lambda: True)
    assert joined(1.0) == ({}, ["trl"])
    assert joined(0.0) == ({"trl": "trl_step.py ended: no memory"}, [])
    with pytest.raises(AssertionError, match="trl: d weight is off"):
        joined(1.001)


def test_the_roofline_is_of_the_given_threads() -> None:
    found = measure_roofline(1, quick=True)
    assert found.threads == 1
    assert found.gemm_gflop_per_s > 0


def test_peers_that_are_missing_are_named() -> None:
    nothing = dict.fromkeys(("trl", "flash_pref", "sglang"), False)
    everything = dict.fromkeys(nothing, True)
    found = not_run(nothing, quick=False, results={})
    assert found["TRL"] == found["flash-pref"] == "not installed: make bench-peers"
    assert found["SGLang"] == "not installed: make sglang"
    assert not not_run(everything, quick=False, results={}).keys() & {"TRL", "flash-pref", "SGLang"}
    assert not_run(everything, quick=True, results={})["flash-pref"] == "left out by --quick"


def test_a_profile_tells_python_from_operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(step.WORKLOADS, "step:agent", lambda: drawn(30, 4, 10, model=qwen3(2, 128, 128)))
    console = Console(record=True, width=120)
    phases = profile_step("step:agent", tmp_path, console)
    assert list(phases) == ["pack", "plan", "forward", "backward", "optimizer"]
    for phase in phases.values():
        assert 0 <= phase.outside <= phase.wall
    assert phases["forward"].operators["aten::mm"] > 0
    assert phases["backward"].calls["aten::mm"] > phases["forward"].calls["aten::mm"]
    assert "Python and dispatch" in console.export_text()
    assert json.loads((tmp_path / "step-agent-trace.json").read_text())["traceEvents"]


def test_where_a_run_is() -> None:
    """The innermost frame of ours inside a training step decides."""

    def frame(path: str, name: str, back: SimpleNamespace | None) -> SimpleNamespace:
        return SimpleNamespace(f_code=SimpleNamespace(co_filename=path, co_name=name), f_back=back)

    outermost = frame("/a/mosaic_fast/training.py", "step", None)
    engine = frame("/a/mosaic_rollout/engine/local.py", "_drive", outermost)
    inside = frame("/torch/nn/linear.py", "forward", engine)
    assert train.place_of(inside) == ("engine", "local.py:_drive")  # pyrefly: ignore
    agents = frame("/a/mosaic_rollout/agent_loop.py", "run", outermost)
    assert train.place_of(agents) == ("agents", "agent_loop.py:run")  # pyrefly: ignore
    assert train.place_of(outermost) == ("other", "training.py:step")  # pyrefly: ignore
    loading = frame("/a/mosaic_fast/components.py", "load", None)
    assert train.place_of(loading) == (train.OUTSIDE, "")  # pyrefly: ignore
    with train.Sampler(threading.get_ident()) as sampler:
        while sampler.counts[train.OUTSIDE] < 3:  # it looks again and again
            time.sleep(0.002)
