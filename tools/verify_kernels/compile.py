"""Ahead-of-time compilation of every compile case, and what the machine code says. No GPU, no driver.

Triton asks its active driver for a target when a kernel is launched. A driver that only knows a target lets
`kernel.warmup` specialise and compile as a launch would, down to machine code, for any architecture the
Triton wheel can assemble for. Spills are counted in the machine code (local loads and stores), since the
resource usage that NVIDIA's tools report reads zero even for kernels that spill.
"""

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from tools.verify_kernels.cases import ARCHITECTURES, KIB, Architecture, CompileCase, all_cases

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What one case compiled to."""

    op: str
    name: str
    arch: str
    registers: int  # a thread
    spills: int  # spilling instructions (NVIDIA), spilled registers (AMD)
    shared_bytes: int  # a block
    blocks_per_sm: int  # that fit at once
    occupancy_frac: float  # resident warps over the architecture's limit
    matrix_instructions: int
    problems: tuple[str, ...]


class _CompileOnly:
    """As much of a Triton driver as compiling needs: a target, and no device."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_case(case: CompileCase) -> Compiled:
    """Compile one case and read its machine code.

    Changes the process's active Triton driver: to be called in a process of its own (see `compile_all`), in
    which TRITON_INTERPRET is not set.
    """
    architecture = ARCHITECTURES[case.arch]
    driver = _CompileOnly(architecture.target)
    triton.runtime.driver.set_active(driver)  # pyrefly: ignore [bad-argument-type]
    case.kernel.device_caches.clear()  # they are keyed by device, and ours changes its target
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = case.kernel.warmup(*case.arguments, grid=(1,), **case.constants, **options)
    if architecture.target.backend == "cuda":
        registers, spills, code = _read_cubin(kernel.asm["cubin"])
    else:
        registers, spills, code = _read_amdgcn(kernel.asm["amdgcn"])
    shared = int(kernel.metadata.shared)
    matrix = len(re.findall(architecture.matrix_instructions, code))
    blocks = _resident_blocks(architecture, registers, shared, case.num_warps)
    problems = []
    if spills:
        problems.append(f"{spills} spills")
    if shared > architecture.block_shared_bytes:
        problems.append(f"{shared} bytes of shared memory, the limit is {architecture.block_shared_bytes}")
    if case.tensor_cores and not matrix:
        problems.append("no tensor-core instructions")
    return Compiled(
        op=case.op, name=case.name, arch=case.arch, registers=registers, spills=spills, shared_bytes=shared,
        blocks_per_sm=blocks, occupancy_frac=blocks * case.num_warps / architecture.warps,
        matrix_instructions=matrix, problems=tuple(problems),
    )  # fmt: skip


def compile_all(arch: str | None = None, holding: str = "", processes: int = 2) -> Iterator[Compiled]:
    """Compile the cases that `all_cases` gives, in processes of their own; in order."""
    count = len(all_cases(arch, holding))
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, max(count, 1))) as pool:
        yield from pool.imap(_compile_index, [(arch, holding, index) for index in range(count)])


def _compile_index(which: tuple[str | None, str, int]) -> Compiled:
    arch, holding, index = which
    return compile_case(all_cases(arch, holding)[index])


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """Registers a thread, spilling instructions, and the SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        sass = _output("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no register count: {usage[:200]!r}")
    return int(found[1]), len(re.findall(r"\b(?:STL|LDL)\b", sass)), sass


def _read_amdgcn(assembly: str) -> tuple[int, int, str]:
    """Vector registers a lane, spilled registers, and the assembly."""

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the AMD assembly has no .{name}")
        return int(found[1])

    return metadata("vgpr_count"), metadata("vgpr_spill_count") + metadata("sgpr_spill_count"), assembly


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _resident_blocks(architecture: Architecture, registers: int, shared: int, num_warps: int) -> int:
    """Blocks of a kernel that fit on one multiprocessor at a time."""
    if architecture.target.backend == "cuda":
        warp_registers = -(-registers * 32 // 256) * 256  # allocated 256 at a time
        by_registers = architecture.registers // (warp_registers * num_warps)
        reserved = KIB  # of shared memory a block, by the driver
    else:
        waves = 4 * min(8, architecture.registers // max(-(-registers // 8) * 8, 1))  # on 4 SIMDs
        by_registers = waves // num_warps
        reserved = 0
    by_shared = architecture.shared_bytes // (shared + reserved) if shared + reserved else architecture.warps
    return min(by_registers, architecture.warps // num_warps, by_shared)


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
    yield "Rewritten by `python -m tools.verify_kernels --layer compile --table docs/lab/compiled.md`."
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
