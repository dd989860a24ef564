"""Work counters: the multiply-adds and bytes a Triton kernel performs, counted under Triton's interpreter."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter


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
