"""What Triton kernels do, counted under Triton's interpreter: their multiply-adds, bytes and memory traffic.

Memory traffic is that behind an L2 cache: the tiles that programs load are recorded and replayed through a
model. As many programs run at a time as the device has places for, started in the order of their ids, and
each loads a tile in turn; the cache holds a number of lines and drops the least recently used. Real programs
drift apart and real caches are not fully associative, so this compares orders of programs; it does not
predict a time.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter

from mosaic_kernels.forest.layout import IntArray

Program = list[IntArray]  # for each tile it loads, the lines


@dataclass
class Work:
    """What kernels launched inside `count_work` have done."""

    dots: int = 0
    dot_flops: int = 0  # 2 for each multiply-add, padding included
    bytes_read: int = 0  # each masked-in element of each load, however often it is read
    bytes_written: int = 0


@contextmanager
def count_work() -> Iterator[Work]:
    """Count the work of every launch inside the block. Needs TRITON_INTERPRET=1 before triton's import.

    Example: a kernel that copies 100 floats with a masked block of 128 reads and writes 400 bytes.
    """
    builder, work = interpreter.InterpreterBuilder, Work()
    dot, load, store = builder.create_dot, builder.create_masked_load, builder.create_masked_store

    def counted_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        work.dots += 1
        work.dot_flops += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return dot(self, a, b, *rest)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        work.bytes_read += _bytes(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        work.bytes_written += _bytes(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with ExitStack() as stack:
        for name, counted in (
            ("create_dot", counted_dot),
            ("create_masked_load", counted_load),
            ("create_masked_store", counted_store),
        ):
            stack.enter_context(mock.patch.object(builder, name, counted))
        yield work


def _bytes(pointers: Any, mask: Any) -> int:
    # Unmasked loads reach this with a mask of ones, and a scalar mask counts for its one element.
    return int(np.count_nonzero(mask.data)) * (pointers.get_element_ty().primitive_bitwidth // 8)


@contextmanager
def record_tiles(line_bytes: int) -> Iterator[list[list[Program]]]:
    """The two-dimensional loads of every launch inside the block, launch by launch and program by program.

    Programs are in the order of their ids. Needs TRITON_INTERPRET=1 before triton's import.
    """
    builder = interpreter.InterpreterBuilder
    start_launch, start_program = builder.set_grid_dim, builder.set_grid_idx
    load = builder.create_masked_load
    launches: list[list[Program]] = []
    width = 1

    def recorded_launch(self: Any, x: int, y: int, z: int) -> None:
        nonlocal width
        assert y == z == 1, "programs are ordered by their first id"
        width = x
        launches.append([])
        start_launch(self, x, y, z)

    def recorded_program(self: Any, x: int, y: int, z: int) -> None:
        assert len(launches[-1]) == x < width
        launches[-1].append([])
        start_program(self, x, y, z)

    def recorded_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if pointers.data.ndim == 2:
            addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            launches[-1][-1].append(np.unique(addresses.astype(np.int64) // line_bytes))
        return load(self, pointers, mask, *rest)

    with ExitStack() as stack:
        for name, recorded in (
            ("set_grid_dim", recorded_launch),
            ("set_grid_idx", recorded_program),
            ("create_masked_load", recorded_load),
        ):
            stack.enter_context(mock.patch.object(builder, name, recorded))
        yield launches


def lines_from_memory(programs: Sequence[Program], places: int, cache_lines: int) -> int:
    """How many lines the programs of a launch read past the cache, `places` of them at a time.

    Example: two programs that each load lines 0 and 1 read 2 lines side by side, and 4 one after the other
    through a cache of one line.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    waiting = iter(programs)
    running = [iter(program) for _, program in zip(range(places), waiting, strict=False)]
    missed = 0
    while running:
        still: list[Iterator[IntArray]] = []
        for loads in running:
            touched = next(loads, None)
            while touched is None:  # this program has ended: the next one takes its place
                following = next(waiting, None)
                if following is None:
                    break
                loads = iter(following)
                touched = next(loads, None)
            if touched is None:
                continue
            still.append(loads)
            for line in touched.tolist():
                if line in cache:
                    cache.move_to_end(line)
                    continue
                missed += 1
                cache[line] = None
                if len(cache) > cache_lines:
                    cache.popitem(last=False)
        running = still
    return missed
