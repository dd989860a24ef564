"""python -m tests.fresh [--examples 1000] [--seed N] [--layer pytorch|interpreter|ttsem] [TESTS...]

Every property of the tests with draws of its own, from a seed that is printed; the same seed draws the same
again. Without --layer: what runs in plain PyTorch and Python. Exits with pytest's status.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = {  # name -> environment, module that runs the tests, which tests
    "pytorch": ({}, ["pytest"], ["tests"]),
    "interpreter": ({"TRITON_INTERPRET": "1"}, ["pytest"], ["tests/kernels/triton"]),
    "ttsem": ({"MOSAIC_EMULATED": "1"}, ["ttsem.sanitize", "pytest"], ["tests/kernels/triton"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fresh", description=__doc__.splitlines()[2])
    parser.add_argument("--examples", type=int, default=1000, help="draws of each property (default 1000)")
    parser.add_argument("--seed", type=int, help="where to draw from (default: a new one)")
    parser.add_argument("--layer", choices=LAYERS, default="pytorch", help="what executes the kernels")
    parser.add_argument("tests", nargs="*", help="files or test ids (default: all properties of the layer)")
    options = parser.parse_args()
    if options.examples < 1:
        parser.error(f"--examples must be at least 1, got {options.examples}")
    seed = secrets.randbelow(2**63) if options.seed is None else options.seed
    environment, module, tests = LAYERS[options.layer]
    again = f"--seed {seed} --examples {options.examples} --layer {options.layer}"
    print(f"the same draws again: python -m tests.fresh {again} {shlex.join(options.tests)}", flush=True)
    command = [sys.executable, "-m", *module, "-m", "hypothesis", f"--hypothesis-seed={seed}"]
    usual = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MOSAIC_EMULATED")}
    done = subprocess.run(
        [*command, *(options.tests or tests)],
        cwd=ROOT,
        env={**usual, **environment, "MOSAIC_FRESH_EXAMPLES": str(options.examples)},
        check=False,
    )
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
