"""python -m tools.gpu [--json FILE] [--seconds N] [--small]: what a GPU makes of all this, within 8 minutes.

Self-checks of the kernels, every op against the fp64 oracle, a training step of the shape of Qwen3-1.7B, and
the benchmark's cases beside the peers that are installed. No network, no installation: the Python that runs
this is the one that is measured.

--small  rehearse on a CPU, the kernels emulated: no figure means anything
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATHS = (ROOT, ROOT / "kernels", ROOT / "rollout", ROOT / "bench")
SECONDS = 470.0


@dataclass(frozen=True)
class Part:
    """Something to find out, and what it takes."""

    name: str
    limit_s: float
    needs: tuple[str, ...] = ("torch",)
    emulated: bool = False  # in a rehearsal, by Triton's interpreter


_MODEL = ("torch", "triton", "transformers", "safetensors")
PARTS = (
    Part("machine", 40),
    Part("checks", 80, ("torch", "triton"), emulated=True),
    Part("verify", 80, ("torch", "triton"), emulated=True),
    Part("step", 110, _MODEL),
    Part("attention", 60, _MODEL),
    Part("logprob", 50, _MODEL),
    Part("preference", 50, _MODEL),
    Part("step:agent", 90, _MODEL),
    Part("tests", 60, ("torch", "triton", "pytest", "hypothesis"), emulated=True),
)


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    status: str  # ok, failed, out of time, not run
    seconds: float = 0.0
    why: str = ""
    figures: dict[str, object] = field(default_factory=dict)


def main(parts: Sequence[Part] = PARTS) -> int:
    """Run the parts; returns 1 where one failed, 0 where all were right or could not be run."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"for all parts (default {SECONDS:.0f})"
    )
    parser.add_argument("--small", action="store_true", help="rehearse on a CPU, the kernels emulated")
    options = parser.parse_args()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    start, outcomes = time.monotonic(), []
    for part in parts:
        left = options.seconds - (time.monotonic() - start)
        print(f"== {part.name}: at most {min(part.limit_s, left):.0f} s", flush=True)
        found = outcome_of(part, options.json.parent, min(part.limit_s, left), small=options.small)
        print(f"== {part.name}: {found.status}, {found.seconds:.0f} s {found.why}", flush=True)
        outcomes.append(found)
        write(outcomes, options.json, small=options.small)
    print(table(outcomes))
    print(f"wrote {options.json} and {options.json.with_suffix('.md')}")
    return int(any(one.status == "failed" for one in outcomes))


def outcome_of(part: Part, folder: Path, limit_s: float, *, small: bool) -> Outcome:
    """Run a part in a process group of its own, which is killed at the end of its time."""
    absent = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if absent:
        return Outcome(part.name, "not run", why=f"needs {', '.join(absent)}")
    if limit_s <= 0:
        return Outcome(part.name, "not run", why="no time was left")
    file = folder / f".part-{part.name.replace(':', '-')}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.gpu.parts", part.name, str(file), *(["--small"] if small else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS)), "HF_HUB_OFFLINE": "1"}
    inherited = os.environ.get("PYTHONPATH")
    if inherited:
        environment["PYTHONPATH"] += os.pathsep + inherited
    if small and part.emulated:
        environment["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    status = "ok"
    try:
        said, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        status = "out of time"
    if status == "ok" and process.returncode:
        status = "not run" if process.returncode == 3 else "failed"
    seconds = time.monotonic() - start
    print(said[-4000:] if said else "", end="", flush=True)
    why = last_line(said) if status in ("failed", "not run") else ""
    return Outcome(part.name, status, round(seconds, 1), why, figures_in(file))


def figures_in(file: Path) -> dict[str, object]:
    """What a part has written by the time it ended, however it ended."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    finally:
        file.unlink(missing_ok=True)


def last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def write(outcomes: Sequence[Outcome], file: Path, *, small: bool) -> None:
    """The JSON file and the table beside it, each complete or as it was before."""
    content = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rehearsal": small,
        "parts": [asdict(one) for one in outcomes],
    }
    for path, text in (
        (file, json.dumps(content, indent=1) + "\n"),
        (file.with_suffix(".md"), table(outcomes) + "\n"),
    ):
        unfinished = path.with_name(f".tmp-{path.name}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row a figure of each part."""
    rows = ["| part | what | figure |", "|---|---|---|"]
    for one in outcomes:
        rows.append(f"| {one.name} | {one.status}, {one.seconds:.0f} s | {_cell(one.why)} |")
        rows += [f"| | {name} | {_cell(value)} |" for name, value in flat(one.figures).items()]
    return "\n".join(rows)


def flat(figures: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested figures by names with dots between."""
    found: dict[str, object] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= flat({str(key): inner for key, inner in value.items()}, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")[:160]


if __name__ == "__main__":
    sys.exit(main())
