"""The sums of |terms| behind the ops' results, for rounding.py: each formula again, in absolute values.

In fp64, from the inputs alone: nothing here is shared with the ops. An op's results come first, then the
gradients of its inputs, as in `rounding.worst_of`.
"""

from collections.abc import Sequence

import torch

from mosaic_kernels.forest.layout import PackedForest
from mosaic_kernels.rounding import FLUSHED, Magnitude, accumulated, least, unit


def attention_magnitudes(
    q: torch.Tensor,  # [U, Hq, D] fp64, as all that follow
    k: torch.Tensor,  # [U, Hkv, D]
    v: torch.Tensor,  # [U, Hkv, V]
    forest: PackedForest,
    grad: torch.Tensor,  # [T, Hq, V] of the output, one row a rollout token
    *,
    window: int | None,
    scale: float | None,
    dtype: torch.dtype,  # of the op's inputs
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [Hq]
) -> list[Magnitude]:  # of out [T, Hq, V], dq, dk, dv (, dsinks)
    """A score is off by its terms, |q| |k|; its weight by that, relatively, and by the logsumexp's share."""
    q, k, v, grad = (x.detach().cpu() for x in (q, k, v, grad))
    sink = q.new_full((q.shape[1],), -torch.inf) if sinks is None else sinks.detach().cpu()
    sink = sink[:, None, None]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = [[q.new_zeros(0, heads, v.shape[2])] for _ in range(2)]
    d_sinks = q.new_zeros(2, heads)
    dq, dk, dv = ([torch.zeros_like(x) for _ in range(2)] for x in (q, k, v))
    for start, stop in zip(forest.cu_seqlens, forest.cu_seqlens[1:], strict=False):
        nodes = torch.from_numpy(forest.node_index[start:stop])
        queries, incoming = (x.transpose(0, 1) for x in (q[nodes], grad[start:stop].abs()))  # [Hq, L, D]
        keys, values = (x[nodes].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        distance = torch.arange(len(nodes))[:, None] - torch.arange(len(nodes))[None, :]
        seen = (distance >= 0) & (distance < (len(nodes) + 1 if window is None else window))
        if chunk is not None:
            place = torch.arange(len(nodes)) // chunk
            seen &= place[:, None] == place[None, :]
        scores = queries @ keys.transpose(1, 2) * scale
        queries, keys, values = queries.abs(), keys.abs(), values.abs()
        terms = queries @ keys.transpose(1, 2) * abs(scale)
        slope = torch.ones_like(terms)
        if softcap is not None:
            bent = (scores / softcap).tanh()
            slope = 1 - bent**2 + 2 * terms / softcap  # and how it is off
            scores, terms = bent * softcap, (1 - bent**2) * terms + 2 * bent.abs() * softcap
        scores = scores.masked_fill(~seen, -torch.inf)
        total = torch.logsumexp(torch.cat([scores, sink.expand(-1, len(nodes), -1)], -1), -1, keepdim=True)
        weights, sunk = (scores - total).exp(), (sink - total).exp()
        sunk_terms = torch.where(sink == -torch.inf, 0.0, sink.abs())
        total = total.abs() + (weights * terms).sum(-1, keepdim=True) + sunk * sunk_terms
        product = incoming @ values.transpose(1, 2)  # d_weights, in terms
        mean = (weights * product).sum(-1, keepdim=True)  # delta, in terms
        for part, at_least in enumerate((FLUSHED, least(dtype))):
            off = (
                1 + terms + total if part == 0 else torch.ones_like(terms)
            )  # how a weight is off, relatively
            weight = (weights + at_least) * seen * off
            d_scores = weight * (product + mean) + (weights + at_least) * seen * (
                (weight * product).sum(-1, keepdim=True) + at_least
            )
            out[part].append((weight @ values).transpose(0, 1))
            of_sink = (sunk + at_least) * (1 + sunk_terms + total if part == 0 else 1)
            d_sinks[part] += (of_sink * (mean + (weight * product).sum(-1, keepdim=True))).sum((1, 2))
            d_scores = d_scores * slope
            dq[part].index_add_(0, nodes, (d_scores @ keys * abs(scale)).transpose(0, 1))
            of_key = [
                (d_scores.transpose(1, 2) @ queries * abs(scale)),
                weight.transpose(1, 2) @ incoming,
            ]
            for into, part_of_heads in zip((dk, dv), of_key, strict=True):
                summed = part_of_heads.unflatten(0, (-1, group)).sum(1)
                into[part].index_add_(0, nodes, summed.transpose(0, 1))
    gradients = [dq, dk, dv, *([] if sinks is None else [d_sinks])]
    return [Magnitude(torch.cat(out[0]), torch.cat(out[1])), *(Magnitude(*x) for x in gradients)]


def logprob_magnitudes(
    hidden: torch.Tensor,  # [N, D] fp64, as all that follow
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [E] int64
    rows: torch.Tensor,  # [E] int64
    grad: torch.Tensor,  # [E] of the log-probs; may be their magnitudes
    entropy_grad: torch.Tensor | None,  # [N]
    *,
    bias: torch.Tensor | None,  # [V]
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,  # of the op's inputs
) -> list[Magnitude]:  # of the log-probs [E], the entropy [N], dhidden, dweight, dbias
    """A logit is off by its terms, |hidden| |weight| + |bias|; its probability by that, relatively."""
    hidden, weight, targets, rows = (x.detach().cpu() for x in (hidden, weight, targets, rows))
    grad = grad.detach().cpu().abs()
    logits, terms = hidden @ weight.T, hidden.abs() @ weight.abs().T
    if bias is not None:
        bias = bias.detach().cpu()
        logits, terms = logits + bias, terms + torch.where(bias.isinf(), 0.0, bias.abs())
    slope = torch.ones_like(terms)
    if softcap is not None:
        slope = 1 - (logits / softcap).tanh() ** 2 + 2 * terms / softcap  # and how it is off
        logits = (logits / softcap).tanh() * softcap
    logits, terms, slope = logits / temperature, terms / temperature, slope / temperature
    total = torch.logsumexp(logits, 1, keepdim=True)  # [N, 1]
    log_p = logits - total
    p = log_p.exp()
    log_p = torch.where(p == 0, 0.0, log_p)
    off = 1 + terms + (p * terms).sum(1, keepdim=True) + total.abs()  # of p, relatively; of log p
    entropy = ((p + FLUSHED) * off * (1 + log_p.abs())).sum(1)

    received = p.new_zeros(len(p), 1).index_add(0, rows, grad[:, None])  # [N, 1]
    incoming = []
    for share in ((p + FLUSHED) * off, p + least(dtype)):
        d_logits = received * share
        d_logits = d_logits.index_put((rows, targets), grad, accumulate=True)
        if entropy_grad is not None:
            own = entropy_grad.detach().cpu().abs()[:, None]
            d_logits = d_logits + own * share * (log_p.abs() + off + entropy[:, None])
        incoming.append(d_logits * slope)
    return [
        *(Magnitude(x, torch.zeros_like(x)) for x in (off[rows, targets], entropy)),  # fp32 always
        Magnitude(*(x @ weight.abs() for x in incoming)),
        Magnitude(*(x.T @ hidden.abs() for x in incoming)),
        Magnitude(*(x.sum(0) for x in incoming)),
    ]


def preference_magnitudes(
    logprobs: torch.Tensor,  # [T] fp64
    sizes: torch.Tensor,  # [T] what each log-prob and its reference are off by, in units; |both| if exact
    reference: torch.Tensor | None,  # [T]
    forest: PackedForest,
    pairs: Sequence[tuple[int, int]],
    preference: Sequence[float],
    grad: torch.Tensor,  # [P] of the losses
    *,
    beta: float,
) -> list[Magnitude]:  # of the losses [P], and of the gradient of the log-probs [T]
    """A margin is off by the terms of both rollouts' sums; the loss by that, as steep as it is there."""
    mask = torch.from_numpy(forest.trained)
    values = logprobs if reference is None else logprobs - reference
    values, sizes = (torch.where(mask, x.detach().cpu(), 0.0) for x in (values, sizes))
    owner = torch.repeat_interleave(
        torch.arange(forest.num_rollouts), torch.from_numpy(forest.cu_seqlens).diff()
    )
    margin, terms = (values.new_zeros(forest.num_rollouts).index_add(0, owner, x) for x in (values, sizes))
    index = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    choice = torch.tensor(preference, dtype=torch.float64)
    x = beta * (margin[index[:, 0]] - margin[index[:, 1]])
    off = beta * (terms[index[:, 0]] + terms[index[:, 1]])
    steep = choice * torch.sigmoid(-x) + (1 - choice) * torch.sigmoid(x) + FLUSHED  # terms that may cancel
    zero = torch.zeros_like(x)
    loss = choice * torch.logaddexp(zero, -x) + (1 - choice) * torch.logaddexp(zero, x)
    slope = beta * grad.detach().cpu().abs() * steep * (1 + off + x.abs())
    rollouts = slope.new_zeros(forest.num_rollouts)
    for side in (0, 1):
        rollouts = rollouts.index_add(0, index[:, side], slope)
    tokens = torch.where(mask, rollouts[owner], 0.0)
    return [Magnitude(loss + steep * off, torch.zeros_like(loss)), Magnitude(tokens, tokens)]


def forest_preference_magnitudes(
    hidden: torch.Tensor,  # [U, D] fp64
    weight: torch.Tensor,  # [V, D] fp64
    forest: PackedForest,
    pairs: Sequence[tuple[int, int]],
    preference: Sequence[float],
    grad: torch.Tensor,  # [P] of the losses
    *,
    reference: torch.Tensor | None,  # [T]
    beta: float,
    dtype: torch.dtype,  # of hidden and weight
) -> list[Magnitude]:  # of the losses [P], dhidden, dweight
    """The log-probs' magnitudes through the losses', and back."""
    nodes, parents = torch.from_numpy(forest.node_index), torch.from_numpy(forest.parent)
    trained = torch.from_numpy(forest.trained)
    tokens = nodes[trained]
    rows, targets = parents[tokens], torch.from_numpy(forest.tokens)[tokens]

    def of_edges(incoming: torch.Tensor) -> list[Magnitude]:
        return logprob_magnitudes(
            hidden, weight, targets, rows, incoming, None,
            bias=None, temperature=1.0, softcap=None, dtype=dtype,
        )  # fmt: skip

    logprobs, sizes = hidden.new_zeros(2, forest.num_tokens).detach().cpu()
    logits = hidden.detach().cpu() @ weight.detach().cpu().T
    logprobs[trained] = torch.log_softmax(logits, 1)[rows, targets]
    sizes[trained] = of_edges(torch.zeros(len(rows), dtype=torch.float64))[0].sums
    if reference is not None:
        sizes = sizes + reference.detach().cpu().abs()
    losses, into = preference_magnitudes(
        logprobs, sizes, reference if reference is None else reference.detach().cpu(), forest,
        pairs, preference, grad, beta=beta,
    )  # fmt: skip
    return [losses, *of_edges(into.sums[trained])[2:4]]


def surrogate_magnitudes(
    policy: torch.Tensor,  # [T] fp64, as all that follow
    start: torch.Tensor,  # [T]
    advantages: torch.Tensor,  # [T]
    weights: torch.Tensor,  # [T]
    reference: torch.Tensor | None,  # [T]
    grad: torch.Tensor,  # [T] of the losses
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    dtype: torch.dtype,
) -> list[Magnitude]:  # of the losses, and of the gradient of the policy's log-probs
    """A ratio is off by its exponent, relatively.

    Where that may carry it across a bound, either side is right: the gradient jumps there by all it is.
    Tokens of weight 0 are 0 exactly.
    """
    counted = weights != 0
    policy, start, advantages, weights, grad = (
        torch.where(counted, x.detach(), 0.0) for x in (policy, start, advantages, weights, grad)
    )
    d = policy - start
    ratio, off = d.exp(), 1 + d.abs()
    bound = torch.where(advantages > 0, 1 + clip_high, 1 - clip_low)
    near = (ratio - bound).abs() <= 16 * unit(accumulated(dtype)) * (ratio * off + bound)
    clipped = torch.where(advantages > 0, ratio.clamp(max=1 + clip_high), ratio.clamp(min=1 - clip_low))
    loss = (weights * advantages).abs() * clipped * off
    slope = (weights * advantages).abs() * torch.where(
        (ratio == clipped) | near, ratio * off * torch.where(near, 1 / unit(torch.float64), 1.0), 0.0
    )
    if reference is not None:
        gap = torch.where(counted, reference.detach(), 0.0) - policy
        terms = gap.exp() * (1 + gap.abs()) + 1  # of 1 - exp(d)
        loss = loss + kl_weight * weights.abs() * (terms + gap.abs())
        slope = slope + kl_weight * weights.abs() * terms
    slope = slope * grad.abs()
    return [Magnitude(loss, torch.zeros_like(loss)), Magnitude(slope, slope)]
