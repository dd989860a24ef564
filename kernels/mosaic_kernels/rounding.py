"""How far rounding may take the results of the ops: the criterion of their tests and of `verify`.

A floating-point sum of n terms is off by the unit roundoff times the sum of |terms|, a few times over,
however small the sum itself is: dq of a softmax over one key is exactly 0, and computed as a difference of
two equal numbers. So an error is held against what cancels. `Magnitude` holds, for every element of a result,
the sum of |terms| of all that is rounded on the way to it, computed in fp64 with absolute values. A factor
that is off itself, as a softmax weight is by the rounding of its score, makes its terms as much larger.

How many times over: roundings err in both directions, so n of them stay below lambda sqrt(n) units but for a
probability of 2 exp(-lambda^2 / 2) (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis,
SIAM J. Sci. Comput. 41, 2019). The partial sums of n equal terms are half of the whole on average, and the
roundings uniform: 2 sqrt(n) units are six standard deviations then, and 4 more are for the few roundings
beside the sum. magnitudes.py has each op's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

CASTS = 6  # numbers rounded to the inputs' dtype on the way to a result: weights, their gradients, the result


@dataclass(frozen=True)
class Magnitude:
    """Sums of |terms| in fp64, shaped like the result."""

    sums: torch.Tensor  # of what is accumulated, in fp32, or in fp64 for fp64
    casts: torch.Tensor  # of what is rounded to the inputs' dtype, where that is narrower


@dataclass(frozen=True)
class Worst:
    """The element of a result whose error takes the largest share of what rounding may do."""

    share: float  # error / allowed, at most 1 where all is right; inf where a value or the shape is wrong
    index: tuple[int, ...] = ()
    error: float = float("nan")
    allowed: float = float("nan")

    def __str__(self) -> str:
        return f"{self.error:.2e} at {list(self.index)}, where {self.allowed:.2e} is allowed"


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the ops sum inputs of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def least(dtype: torch.dtype) -> float:
    """What a number is at least taken for: below, rounding is absolute (fp16), or may flush to 0 (others)."""
    tiny = torch.finfo(dtype).tiny
    return tiny if dtype == torch.float16 else tiny / unit(dtype)


FLUSHED = least(torch.float32)


def allowed(magnitude: Magnitude, dtype: torch.dtype, terms: int) -> torch.Tensor:
    """The largest error of each element. dtype: of the inputs. terms: how many the longest sum has."""
    limit = (4 + 2 * terms**0.5) * unit(accumulated(dtype)) * (magnitude.sums + FLUSHED)
    if dtype != accumulated(dtype):
        limit = limit + CASTS * unit(dtype) * (magnitude.casts + least(dtype) * (magnitude.casts > 0))
    return limit


def worst(
    found: torch.Tensor, exact: torch.Tensor, magnitude: Magnitude, dtype: torch.dtype, terms: int
) -> Worst:
    """Hold a result against the fp64 oracle's."""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    if found.shape != exact.shape or not bool(torch.isfinite(found).all()):
        return Worst(float("inf"))
    if not found.numel():
        return Worst(0.0)
    limit, error = allowed(magnitude, dtype, terms), (found - exact).abs()
    at = int((error / limit).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), found.shape))
    return Worst(float((error / limit).flatten()[at]), index, float(error[index]), float(limit[index]))


def weighting(results: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Random fp64 weights for a loss of all results; every dtype holds them exactly."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    return [(x * 16).round() / 16 for x in drawn]


def gradients_of(
    results: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Of the weighted sum of results; zeros for a leaf that no result depends on."""
    loss = sum((x * w.to(x)).sum() for x, w in zip(results, weights, strict=True))
    # What a leaf is masked for may be NaN: its gradient is there by an empty slice of it.
    return torch.autograd.grad([torch.as_tensor(loss + sum(x[:0].sum() for x in leaves))], leaves)


def worst_of(
    results: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    exact_leaves: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    magnitudes: Sequence[Magnitude],
    terms: int,
) -> list[Worst]:
    """Of each result, then of the gradient of each leaf, in the order of the magnitudes."""
    found = [*results, *gradients_of(results, leaves, weights)]
    exact = [*expected, *gradients_of(expected, exact_leaves, weights)]
    return [
        worst(a, b, magnitude, leaves[0].dtype, terms)
        for a, b, magnitude in zip(found, exact, magnitudes, strict=True)
    ]
