"""The GPUs that kernels are compiled for."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Architecture:
    """Limits of one streaming multiprocessor (compute unit), from the vendors' tuning guides."""

    target: GPUTarget
    block_shared_bytes: int  # the most one block can ask for
    shared_bytes: int
    warps: int
    registers: int  # 32-bit; for AMD those of one SIMD's lane, 512
    matrix_instructions: str  # of which one must occur in a kernel with dots on 16-bit types


KIB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163 * KIB, 164 * KIB, 64, 65536, r"\bHMMA"),
    "sm_86": Architecture(GPUTarget("cuda", 86, 32), 99 * KIB, 100 * KIB, 48, 65536, r"\bHMMA"),
    "sm_89": Architecture(GPUTarget("cuda", 89, 32), 99 * KIB, 100 * KIB, 48, 65536, r"\bHMMA"),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 * KIB, 228 * KIB, 64, 65536, r"\bHG?MMA"),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 227 * KIB, 228 * KIB, 64, 65536, r"\b(?:UTC\w*|H)MMA"),
    "sm_120": Architecture(GPUTarget("cuda", 120, 32), 99 * KIB, 100 * KIB, 48, 65536, r"\bHMMA"),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, 32, 512, r"\bv_mfma"),
}
