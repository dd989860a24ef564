"""Prove that the kernel tests notice wrong kernels: `python -m tests.mutants` from the repository's root.

Each mutant of the catalogue is one replacement in a copy of `mosaic_kernels`; the named test is run against
the copy, under Triton's interpreter or ttsem, and must fail. First each of these tests is run once against
an unchanged copy, where it must pass: a test that fails anyway proves nothing. Exits with 1 if a mutant
survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import TTSEM, Mutant

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "mosaic_kernels"
TIME_LIMIT_S = 600
PASSED, FAILED = 0, 1  # pytest's exit status; 2 to 5 are its own errors


def run(test: str, layer: str, mutant: Mutant | None) -> tuple[int, str]:
    """pytest's exit status and output for one test against a copy of the package, mutated if given."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder) / "mosaic_kernels"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            apply(mutant, copy)
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        environment.pop("MOSAIC_EMULATED", None)
        command = [sys.executable, "-m", "pytest"]
        if layer == TTSEM:
            environment["MOSAIC_EMULATED"] = "1"
            command = [sys.executable, "-m", "ttsem.sanitize", "pytest"]
        else:
            environment["TRITON_INTERPRET"] = "1"
        command += ["-x", "-p", "no:randomly", f"tests/kernels/triton/{test}"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S
        )
    return done.returncode, done.stdout + done.stderr


def apply(mutant: Mutant, package: Path) -> None:
    """Replace in the copy; a replacement that finds nothing is an error of the catalogue."""
    for name, old, new in (*((mutant.file, *pair) for pair in mutant.replace), *mutant.also):
        file = package / name
        source = file.read_text()
        if old not in source:
            raise SystemExit(f"mutant {mutant.name!r}: {name} does not hold {old!r}")
        file.write_text(source.replace(old, new))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only mutants whose name holds this text")
    parser.add_argument("--layer", choices=["interpreter", "ttsem"], help="only mutants of this layer")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.name and options.layer in (None, m.layer)]
    if not chosen:
        parser.error(f"no mutant matches --only {options.only!r}")
    for test, layer in sorted({(m.test, m.layer) for m in chosen}):
        status, output = run(test, layer, None)
        if status != PASSED:
            raise SystemExit(f"{output[-3000:]}\n{test} does not pass under {layer} before any change")
    survivors = []
    for mutant in chosen:
        status, output = run(mutant.test, mutant.layer, mutant)
        if status not in (PASSED, FAILED):
            raise SystemExit(f"{output[-3000:]}\nmutant {mutant.name!r}: pytest did not run")
        killed = status == FAILED
        print(
            f"{'killed' if killed else 'SURVIVED':<9} {mutant.layer:<12} {mutant.file:<29} {mutant.name}",
            flush=True,
        )
        if not killed:
            survivors.append(mutant.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
    if survivors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
