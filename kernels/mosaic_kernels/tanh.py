"""tanh in Triton, for the softcaps of scores and of logits."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh of fp32. The closed form loses digits near 0, where a few terms of the series have all."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2 * tl.abs(x))
    closed = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -closed, closed))
