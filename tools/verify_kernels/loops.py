"""The loops of a kernel's machine code: their tensor products, exponentials, and copies in flight.

A loop is found in the control flow (a jump back to a block that every way there passes), so code that the
assembler moved out of the way counts where it is executed. Of nested loops the innermost with tensor products
counts.

Example: `HGMMA.64x256x16` in a block of 8 warps is executed by 2 warpgroups, 2 x 64 x 256 x 16 multiply-adds.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# What one instruction multiplies, M x N x K, and how many warps execute it together. UTCHMMA is of a whole
# block, and a descriptor says its size.
PRODUCTS = {
    "HGMMA": (re.compile(r"\bHGMMA\.(\d+)x(\d+)x(\d+)"), 4),
    "HMMA": (re.compile(r"\bHMMA\.(16)(8)(16|8|4)\b"), 1),
    "UTCHMMA": (re.compile(r"\bUTCHMMA\b.*idesc\[(UR\d+)\]"), 0),
    "v_mfma": (re.compile(r"\bv_mfma_\w+?_(\d+)x(\d+)x(\d+)"), 1),
}
EXPONENTIAL = re.compile(r"\bMUFU\.EX2|\bv_exp_f32")
WAIT_FOR_COPIES = re.compile(r"(?<!\.)\bDEPBAR\.LE SB0, 0x(\w+)")
JUMP = re.compile(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.L\w+)")
ALWAYS = re.compile(r"(?:BRA|s_branch|EXIT|RET|s_endpgm)\b(?!\.(?:U|DIV))")  # no instruction follows it


@dataclass(frozen=True)
class Loop:
    """What one iteration does, in all threads of a block together."""

    lines: Mapping[tuple[str, int], int]  # source file and line -> instructions compiled from it
    multiply_adds: Mapping[str, int]  # by the kind of instruction, a key of PRODUCTS
    exponentials: int
    in_flight: (
        int | None
    )  # groups of copies that its strictest wait leaves in flight; None: it waits for none


def loops_of(code: str, num_warps: int, threads_of_warp: int) -> list[Loop]:
    """The loops with tensor products of a disassembly (nvdisasm -c -g) or an AMD assembly, in order."""
    blocks, successors = _control_flow(code)
    bodies = _natural_loops(successors)
    measured = {
        body: _measure([one for index in sorted(body) for one in blocks[index]], num_warps, threads_of_warp)
        for body in sorted(bodies, key=min)
    }
    working = {body: loop for body, loop in measured.items() if loop.multiply_adds}
    return [loop for body, loop in working.items() if not any(other < body for other in working)]


Instruction = tuple[str, tuple[str, int]]  # with its predicate; the source line that it was compiled from


def _control_flow(code: str) -> tuple[list[list[Instruction]], list[set[int]]]:
    """The basic blocks in order, and for each the blocks that may follow it."""
    blocks: list[list[Instruction]] = [[]]
    block_of_label: dict[str, int] = {}
    files: dict[str, str] = {}  # of an AMD assembly, by number
    source = ("", 0)
    for line in code.splitlines():
        text = line.strip()
        if label := re.match(r"(\.L\w+):", text):
            if blocks[-1]:
                blocks.append([])
            block_of_label[label[1]] = len(blocks) - 1
        elif at := re.match(r'//## File "(.*?)", line (\d+)', text):
            source = (at[1].rpartition("/")[2], int(at[2]))
        elif named := re.match(r'\.file\s+(\d+)\s.*"(.*?)"', text):
            files[named[1]] = named[2]
        elif at := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
            source = (files.get(at[1], ""), int(at[2]))
        elif instruction := re.match(r"(?:/\*\w+\*/\s+)?([@A-Za-z][^.].*)", text):
            blocks[-1].append((instruction[1], source))
            if JUMP.search(instruction[1]) or ALWAYS.match(instruction[1]):
                blocks.append([])
    successors = []
    for index, block in enumerate(blocks):
        last = block[-1][0] if block else ""
        target = JUMP.search(last)
        following = {block_of_label[target[1]]} if target else set()
        if not ALWAYS.match(last) and index + 1 < len(blocks):
            following.add(index + 1)
        successors.append(following)
    return blocks, successors


def _natural_loops(successors: Sequence[set[int]]) -> list[frozenset[int]]:
    """For each block that is jumped back to, itself and the blocks from which it is reached again."""
    count = len(successors)
    predecessors = [{a for a in range(count) if b in successors[a]} for b in range(count)]
    dominators = [{0}, *({*range(count)} for _ in range(1, count))]
    changed = True
    while changed:
        changed = False
        for block in range(1, count):
            before = [dominators[one] for one in predecessors[block]]
            new = {block} | (set.intersection(*before) if before else set())
            changed |= new != dominators[block]
            dominators[block] = new
    bodies: dict[int, set[int]] = {}
    for tail in range(count):
        for head in successors[tail] & dominators[tail]:
            body = bodies.setdefault(head, {head})
            waiting = [tail]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += predecessors[block]
    return [frozenset(body) for body in bodies.values()]


def _measure(instructions: Sequence[Instruction], num_warps: int, threads_of_warp: int) -> Loop:
    multiply_adds: Counter[str] = Counter()
    exponentials, waits = 0, []
    descriptors: dict[str, int] = {}
    for text, _ in instructions:
        if constant := re.match(r"UMOV (UR\d+), 0x(\w+)", text):
            descriptors[constant[1]] = int(constant[2], 16)
        for kind, (pattern, warps) in PRODUCTS.items():
            if found := pattern.search(text):
                if kind == "UTCHMMA":
                    multiply_adds[kind] += _described(descriptors[found[1]])
                else:
                    m, n, k = map(int, found.groups())
                    multiply_adds[kind] += m * n * k * num_warps // warps
        exponentials += threads_of_warp * num_warps * bool(EXPONENTIAL.search(text))
        if wait := WAIT_FOR_COPIES.search(text):
            waits.append(int(wait[1], 16))
    return Loop(
        lines=Counter(source for _, source in instructions), multiply_adds=multiply_adds,
        exponentials=exponentials, in_flight=min(waits, default=None),
    )  # fmt: skip


def _described(descriptor: int) -> int:
    """M x N x K of a tcgen05 product of 16-bit types (PTX, instruction descriptor): K is always 16."""
    return (descriptor >> 24 & 31) * 16 * (descriptor >> 17 & 63) * 8 * 16
