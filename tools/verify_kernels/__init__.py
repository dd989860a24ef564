"""Proof of the Triton kernels on a machine without a GPU: what `python -m tools.verify_kernels` is made of.

An op with Triton kernels plugs in by four things:

1. Compile cases. A generator in `cases.py` yields a `CompileCase` for each kernel of each entry of the op's
   tile table. `compile.py` compiles each ahead of time,
   as a launch with these arguments would, and reads registers, spills, shared memory and tensor-core
   instructions.
2. Tests in `tests/kernels/triton/`. They run unchanged under Triton's interpreter, under ttsem and on a GPU.
   With `counters.count_work()` they assert dots and bytes (under the interpreter).
3. A self-check. The op's Triton wrapper calls `check_once(...)` of `mosaic_kernels/selfcheck.py` before its
   first use on a device.
4. Mutants. `tests/mutants/` lists source replacements, each of which must make a named test fail.

Example of 1, for a kernel `scale_kernel(x_ptr, out_ptr, count, factor, BLOCK: tl.constexpr)`:

    def scale_cases() -> Iterator[CompileCase]:
        for (arch, dtype), tile in TILES.items():
            yield CompileCase(
                op="scale", name=f"scale {SHORT_NAMES[dtype]}", arch=arch, kernel=scale_kernel,
                arguments=(dtype, torch.float32, 1000, 0.5), constants={"BLOCK": tile.block},
                num_warps=tile.num_warps, num_stages=tile.num_stages, tensor_cores=False,
            )
"""
