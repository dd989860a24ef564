"""`make gpu`, rehearsed on a CPU in small: what is missing or late is listed, and the rest goes on."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from tools.gpu import __main__ as gpu
from tools.gpu.__main__ import PARTS, Outcome, Part

WITHOUT = """
import importlib.util, sys
ABSENT = {"pydantic", "pydantic_core", "tyro", "tomli_w"}
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] in ABSENT else found(name, *more)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
"""A GPU's image may come without packages that a run needs, and still show what the kernels do."""


def test_a_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file = tmp_path / "out" / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--json", str(file), "--seconds", "900"])
    parts = (
        Part("verify", 0.3, emulated=True),
        Part("logprob", 60, ("no_such_package",)),
        Part("checks", 300, emulated=True),
        Part("no such part", 60),
        Part("step", 300),
    )
    assert gpu.main(parts) == 1
    content = json.loads(file.read_text())
    found = {one["name"]: one for one in content["parts"]}
    assert content["rehearsal"] is True
    assert {name: one["status"] for name, one in found.items()} == {
        "verify": "out of time",
        "logprob": "not run",
        "checks": "ok",
        "no such part": "failed",
        "step": "ok",
    }
    assert found["logprob"]["why"] == "needs no_such_package"
    assert "KeyError" in found["no such part"]["why"]
    assert "of what is allowed" in found["checks"]["figures"]["clipped_surrogate"]
    step = found["step"]["figures"]
    assert {"forward_ms", "backward_ms", "optimizer_ms", "profile", "ideal", "grad_norm"} <= step.keys()
    assert step["unique_tokens"] == 40 + 4 * 20
    rows = file.with_suffix(".md").read_text().splitlines()
    assert "| logprob | not run, 0 s | needs no_such_package |" in rows
    assert any(row.startswith("| | forward_ms | ") for row in rows)
    assert rows == [row for row in capsys.readouterr().out.splitlines() if row.startswith("|")]
    assert [path.name for path in sorted(file.parent.iterdir())] == ["gpu.json", "gpu.md"]


def test_figures_are_written_after_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a part that comes when the time is over is not begun."""
    file, counts = tmp_path / "gpu.json", []
    clock = iter(range(0, 1000, 300))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: float(next(clock)))

    def outcome(part: Part, folder: Path, limit_s: float, *, small: bool) -> Outcome:
        counts.append((limit_s, len(json.loads(file.read_text())["parts"]) if file.exists() else 0))
        return Outcome(part.name, "ok")

    monkeypatch.setattr(gpu, "outcome_of", outcome)
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(file)])
    assert gpu.main(PARTS[:3]) == 0
    assert counts == [(40, 0), (-130.0, 1), (-430.0, 2)]
    monkeypatch.undo()
    assert gpu.outcome_of(Part("machine", 40), tmp_path, -1.0, small=True).why == "no time was left"


def test_all_parts_fit_into_eight_minutes_and_are_there() -> None:
    """What ends early leaves its time to those behind it; no part may take half of all."""
    tree = ast.parse((Path(gpu.__file__).with_name("parts.py")).read_text())
    [table] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "PARTS"
    ]
    assert isinstance(table, ast.Dict)
    assert [one.name for one in PARTS] == [ast.literal_eval(key) for key in table.keys if key is not None]
    assert gpu.SECONDS <= 480
    assert max(one.limit_s for one in PARTS) < gpu.SECONDS / 2
