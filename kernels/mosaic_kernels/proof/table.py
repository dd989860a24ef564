"""The table of compiled kernels: what `verify --layer compile` prints and docs/lab/compiled.md keeps."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import triton

from mosaic_kernels.proof.compile import Compiled, compile_all

HEADER = (
    "arch",
    "op",
    "kernel",
    "registers",
    "spills",
    "shared KiB",
    "blocks/SM",
    "occupancy",
    "matrix instr.",
)


def print_compiled(arch: str | None = None, path: Path | None = None) -> bool:
    """Compile all cases, of one architecture if named; print a row each, write them as Markdown if asked.

    True if no case has a problem.
    """
    rows, problems = [], []
    print(" ".join(f"{name:<14}" for name in HEADER))
    for compiled in compile_all(arch):
        rows.append(compiled)
        print(" ".join(f"{cell:<14}" for cell in _cells(compiled)), *compiled.problems, flush=True)
        problems += [f"{compiled.arch} {compiled.op} {compiled.name}: {one}" for one in compiled.problems]
    print(f"{len(rows)} kernels compiled by Triton {triton.__version__}; {len(problems)} problems")
    for problem in problems:
        print(problem)
    if path is not None:
        path.write_text("\n".join(markdown(rows)) + "\n")
    return bool(rows) and not problems


def markdown(rows: Iterable[Compiled]) -> Iterator[str]:
    """The lines of docs/lab/compiled.md."""
    yield "# Compiled kernels"
    yield ""
    yield f"Every entry of the tile tables as Triton {triton.__version__} compiles it, ahead of time and"
    yield "without a GPU; none of these numbers is a measurement of speed. Registers are a thread's, shared"
    yield "memory is a block's; occupancy is the share of the multiprocessor's warps that fit at once."
    yield "Rewritten by `python -m mosaic_kernels.verify --layer compile --table docs/lab/compiled.md`."
    yield ""
    yield "| " + " | ".join(HEADER) + " |"
    yield "|" + "---|" * len(HEADER)
    for row in rows:
        yield "| " + " | ".join(_cells(row)) + " |"


def _cells(row: Compiled) -> tuple[str, ...]:
    return (
        row.arch, row.op, row.name, str(row.registers), str(row.spills), f"{row.shared_bytes / 1024:.0f}",
        str(row.blocks_per_sm), f"{row.occupancy_frac:.2f}", str(row.matrix_instructions),
    )  # fmt: skip
