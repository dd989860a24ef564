"""Draws keyed by (seed, rollout_key, position), and tokens from logits by inverting the distribution.

The uniforms are those of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014): `stream_base` hashes (seed, rollout_key) to the start of a stream, and the
uniform of a position is the stream's element of that index. A draw thus depends on nothing but its key: not
on the batch, nor on what was drawn before.
"""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection on 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_base(seed: int, rollout_key: int) -> int:
    """Start of the stream of one rollout: 64 bits, a hash of both numbers (each taken modulo 2**64)."""
    seed_hash = _mix(np.array([seed & _MASK], np.uint64) + _GOLDEN)
    return int(_mix(seed_hash ^ _mix(np.array([rollout_key & _MASK], np.uint64) + np.uint64(1)))[0])


def uniforms(
    bases: np.ndarray,  # [N] uint64, from stream_base
    positions: np.ndarray,  # [N] int64, index in the whole sequence of the token being drawn
) -> np.ndarray:
    """Uniforms in [0, 1 - 2**-52], [N] float64.

    52 bits, not 53: then u * total < total after rounding, for every positive total, which `sample_tokens`
    needs.
    """
    bits = _mix(bases + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def sample_tokens(
    logits: torch.Tensor,  # [N, V] of the model's dtype
    temperatures: np.ndarray,  # [N] float64, 0 is greedy
    draws: np.ndarray,  # [N] float64 in [0, 1), from uniforms
    top_ps: np.ndarray | None = None,  # [N] float64 in (0, 1]; None: 1
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N] int64 and their log-probs [N] float32, at the row's temperature (greedy: at temperature 1).

    The log-probs are those of the whole distribution, whatever top_ps leave of it.

    The token is the first whose cumulative probability exceeds draw * total; a token of probability 0 adds
    nothing to the sum and is never that first one. Probabilities are fp32 (fp64 for fp64 logits), the sum
    fp64. Rows with NaN or +inf get a NaN log-prob.

    >>> sample_tokens(torch.tensor([[0.0, 0.0, -torch.inf]]), np.array([1.0]), np.array([0.75]))[0]
    array([1])
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    greedy = temperatures == 0.0
    if (temperatures != 1.0).any():
        divisor = np.where(greedy, 1.0, temperatures)
        scores = scores / torch.from_numpy(divisor).to(scores)[:, None]
    logprobs = torch.log_softmax(scores, dim=-1)
    probs = logprobs.exp()
    if top_ps is not None and (top_ps < 1.0).any():
        probs = _nucleus(probs, torch.from_numpy(top_ps).to(probs.device))
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)  # [N, V]
    targets = torch.from_numpy(draws).to(cumulative.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).clamp_(max=logits.shape[-1] - 1)
    if greedy.any():
        is_greedy = torch.from_numpy(greedy).to(tokens.device)[:, None]
        tokens = torch.where(is_greedy, scores.argmax(dim=-1, keepdim=True), tokens)
    chosen = logprobs.gather(-1, tokens)
    return tokens[:, 0].cpu().numpy(), chosen[:, 0].float().cpu().numpy()


def _nucleus(probs: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:  # [N, V], [N] -> [N, V]
    """The probabilities with 0 outside of the fewest most probable tokens that have the mass top_p together.

    Holtzman et al., arXiv 1904.09751.
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered  # the mass of more probable tokens
    outside = (before >= top_ps[:, None]) & (top_ps[:, None] < 1.0)
    return probs.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
