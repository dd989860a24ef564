"""Ahead-of-time compilation of every compile case, and what the machine code says. No GPU, no driver.

Triton asks its active driver for a target when a kernel is launched. A driver that only knows a target lets
`kernel.warmup` specialise and compile as a launch would, down to machine code, for any architecture the
Triton wheel can assemble for. Spills are counted in the machine code (local loads and stores), since the
resource usage that NVIDIA's tools report reads zero even for kernels that spill. Loops over tiles are held
against what a tile takes: its products once and by the fastest instructions, its exponentials once, and
copies that run ahead.
"""

import ast
import inspect
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from tools.verify_kernels.cases import ARCHITECTURES, KIB, Architecture, CompileCase, TileWork, all_cases
from tools.verify_kernels.loops import Loop, loops_of

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# The only products in a loop over 16-bit tiles, where an architecture has slower ones too.
FASTEST_PRODUCTS = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
TENSOR_WORK, EXPONENTIALS = 1.01, 1.15  # at most, over the tile's: row maxima need exponentials of their own


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
    loops: str  # products and exponentials over those of a tile, and copies in flight, of the worst loop
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
    loops = loops_of(code, case.num_warps, architecture.target.warp_size)
    if case.asserted and case.tile_work is not None:
        problems += loop_problems(case, case.tile_work, loops)
    return Compiled(
        op=case.op, name=case.name, arch=case.arch, registers=registers, spills=spills, shared_bytes=shared,
        blocks_per_sm=blocks, occupancy_frac=blocks * case.num_warps / architecture.warps,
        matrix_instructions=matrix, loops=_summary(loops, case.tile_work), problems=tuple(problems),
    )  # fmt: skip


def loop_problems(case: CompileCase, work: TileWork, loops: Sequence[Loop]) -> Iterator[str]:
    """What is wrong with the loops over tiles, each by its line in the kernel's source."""
    statements = _loop_statements(case)
    if len(loops) != len(statements):
        yield f"{len(loops)} loops with products, the source has {len(statements)}"
    fastest = FASTEST_PRODUCTS.get(case.arch)
    for loop in loops:
        at = _line_of(loop, statements)
        products = sum(loop.multiply_adds.values())
        if products > TENSOR_WORK * work.multiply_adds:
            yield f"{at}: {products / work.multiply_adds:.2f} of the tile's products"
        if loop.exponentials > EXPONENTIALS * work.exponentials:
            yield f"{at}: {loop.exponentials / work.exponentials:.2f} of the tile's exponentials"
        if fastest is not None and set(loop.multiply_adds) != {fastest}:
            yield f"{at}: products by {', '.join(loop.multiply_adds)}, not by {fastest} alone"
        if not loop.in_flight and ARCHITECTURES[case.arch].target.backend == "cuda":
            yield f"{at}: no copies in flight while it waits for a tile's"


def _summary(loops: Sequence[Loop], work: TileWork | None) -> str:
    if not loops or work is None:
        return ""
    products = max(sum(loop.multiply_adds.values()) for loop in loops) / work.multiply_adds
    exponentials = max(loop.exponentials for loop in loops) / work.exponentials
    waits = [loop.in_flight for loop in loops if loop.in_flight is not None]
    return f"{products:.2f} {exponentials:.2f} {min(waits, default='-')}"


def _loop_statements(case: CompileCase) -> list[tuple[str, range]]:
    """The file and the lines of each loop in a kernel's source."""
    lines, start = inspect.getsourcelines(case.kernel.fn)
    file = Path(inspect.getsourcefile(case.kernel.fn) or "").name
    body = ast.parse("".join(lines))
    return [
        (file, range(start - 1 + one.lineno, start + one.end_lineno))
        for one in ast.walk(body)
        if isinstance(one, ast.For) and one.end_lineno is not None
    ]


def _line_of(loop: Loop, statements: Sequence[tuple[str, range]]) -> str:
    """Where the loop begins that most of the instructions come from: "forward.py:117"."""

    def instructions(statement: tuple[str, range]) -> int:
        return sum(loop.lines.get((statement[0], line), 0) for line in statement[1])

    file, lines = max(statements, key=instructions)
    return f"{file}:{lines[0]}"


def compile_all(
    arch: str | None = None, holding: str = "", processes: int = 2, *, groups: bool = False
) -> Iterator[Compiled]:
    """Compile the cases that `all_cases` gives, in processes of their own; in order."""
    count = len(all_cases(arch, holding, groups=groups))
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, max(count, 1))) as pool:
        yield from pool.imap(_compile_index, [(arch, holding, groups, index) for index in range(count)])


def _compile_index(which: tuple[str | None, str, bool, int]) -> Compiled:
    arch, holding, groups, index = which
    return compile_case(all_cases(arch, holding, groups=groups)[index])


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """Registers a thread, spilling instructions, and the SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        sass = _output("nvdisasm", "-c", "-g", file.name)
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
    "loops",
)


def print_compiled(
    arch: str | None = None, path: Path | None = None, holding: str = "", *, groups: bool = False
) -> bool:
    """Compile all cases, or some; print a row each, and write them into a table in Markdown if asked.

    True if no case has a problem.
    """
    rows, problems = [], []
    print(" ".join(f"{name:<14}" for name in HEADER))
    for compiled in compile_all(arch, holding, groups=groups):
        rows.append(compiled)
        print(" ".join(f"{cell:<14}" for cell in _cells(compiled)), *compiled.problems, flush=True)
        problems += [f"{compiled.arch} {compiled.op} {compiled.name}: {one}" for one in compiled.problems]
    print(f"{len(rows)} kernels compiled by Triton {triton.__version__}; {len(problems)} problems")
    for problem in problems:
        print(problem)
    if path is not None:
        before = path.read_text().splitlines() if path.exists() else []
        path.write_text("\n".join(markdown(rows, before)) + "\n")
    return bool(rows) and not problems


def markdown(rows: Iterable[Compiled], before: Iterable[str]) -> Iterator[str]:
    """The lines of docs/lab/compiled.md, in which what was not compiled now stays as it was before."""
    yield "# Compiled kernels"
    yield ""
    yield f"Every entry of the tile tables as Triton {triton.__version__} compiles it, ahead of time and"
    yield "without a GPU; none of these numbers is a measurement of speed. Registers are a thread's, shared"
    yield "memory is a block's; occupancy is the share of the multiprocessor's warps that fit at once. Loops:"
    yield "products and exponentials of the worst loop over its tile's, and the fewest groups of copies"
    yield "that stay in flight while it waits for others (-: it copies nothing ahead)."
    yield "Rewritten by `python -m tools.verify_kernels --layer compile --table docs/lab/compiled.md`."
    yield ""
    yield "| " + " | ".join(HEADER) + " |"
    yield "|" + "---|" * len(HEADER)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in before if line.startswith("| ")]
    table = {tuple(row[:3]): row + [""] * (len(HEADER) - len(row)) for row in cells}
    table |= {(row.arch, row.op, row.name): list(_cells(row)) for row in rows}
    for case in all_cases():
        if row := table.get((case.arch, case.op, case.name)):
            yield "| " + " | ".join(row) + " |"


def _cells(row: Compiled) -> tuple[str, ...]:
    return (
        row.arch, row.op, row.name, str(row.registers), str(row.spills), f"{row.shared_bytes / 1024:.0f}",
        str(row.blocks_per_sm), f"{row.occupancy_frac:.2f}", str(row.matrix_instructions),
        row.loops,
    )  # fmt: skip
