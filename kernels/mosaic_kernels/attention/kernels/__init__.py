"""Tree attention in Triton: flash-style forward, dQ, and dK/dV, over block lists (blocks.py).

Names of dimensions: BLOCK_Q queries by BLOCK_K keys a tile, D the size of queries and keys, V that of values,
BLOCK_D and BLOCK_V the powers of two that hold them. Scores, softmax and accumulators are fp32; logarithms
and exponentials are base 2. Rows past the end are loaded as zeros: as queries they see nothing or multiply
zeros, as keys they are hidden by subtree_end 0. No program writes what another one reads or writes, so there
are no atomics and the result is the same every time. Matrix sizes reach the kernels unspecialised, so that
one compilation serves every forest.

Each loop reads the number of the next block while it works on one. So the copies of blocks ahead start
without waiting for it, and with three stages those of one are in flight while those of another are awaited.

LIMIT: a key is seen for some depths only, by a sliding window or a chunk. SOFTCAP: scores are bent. SINKS: a
head's softmax has one logit more. What is off compiles to nothing.
"""

from mosaic_kernels.attention.kernels.backward import delta_kernel, dkv_kernel, dq_kernel
from mosaic_kernels.attention.kernels.forward import forward_kernel

__all__ = ["delta_kernel", "dkv_kernel", "dq_kernel", "forward_kernel"]
