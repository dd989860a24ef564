"""Sums over lists in Triton: each item's members, always in the same order, without atomics."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_items"])
def gather_sum_kernel(
    values_ptr,  # fp32
    members_ptr,  # [M] int32: indices into values, item by item
    starts_ptr,  # [num_items + 1] int32
    out_ptr,  # [num_items] fp32
    num_items,
    BLOCK: tl.constexpr,
):
    """out[item] = sum of values[members[starts[item] : starts[item + 1]]]."""
    items = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = items < num_items
    start = tl.load(starts_ptr + items, mask=inside, other=0)
    count = tl.load(starts_ptr + items + 1, mask=inside, other=0) - start
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(tl.max(count, 0)):
        member = tl.load(members_ptr + start + index, mask=index < count, other=0)
        total += tl.load(values_ptr + member, mask=index < count, other=0.0)
    tl.store(out_ptr + items, total, mask=inside)
