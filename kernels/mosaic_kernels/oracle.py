"""What the ops must equal, written as plainly as possible: each rollout alone, in the dtype it is given.

Used in fp64 by the tests and by `python -m mosaic_kernels.verify`. Nothing here is shared with the ops:
no packing, no masks of trees, no chunks, one Python loop over rollouts.
"""

from collections.abc import Sequence

import torch

from mosaic_kernels.forest.layout import PackedForest


def attention_of_rollouts(
    q: torch.Tensor,  # [U, Hq, D]
    k: torch.Tensor,  # [U, Hkv, D]
    v: torch.Tensor,  # [U, Hkv, V]
    forest: PackedForest,
    *,
    window: int | None = None,
    scale: float | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [Hq]
) -> torch.Tensor:  # [T, Hq, V], one row a rollout token
    """Causal softmax attention of each rollout by itself, laid end to end."""
    group, head_dim = q.shape[1] // k.shape[1], q.shape[2]
    outs = [q.new_zeros(0, q.shape[1], v.shape[2])]
    for rollout in range(forest.num_rollouts):
        nodes = _nodes(forest, rollout)
        queries = q[nodes].transpose(0, 1)  # [Hq, L, D]
        keys = k[nodes].transpose(0, 1).repeat_interleave(group, dim=0)
        values = v[nodes].transpose(0, 1).repeat_interleave(group, dim=0)
        scores = queries @ keys.transpose(1, 2) * (head_dim**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        at = torch.arange(len(nodes), device=q.device)
        distance = at[:, None] - at[None, :]
        hidden = (distance < 0) | (distance >= (len(nodes) + 1 if window is None else window))
        if chunk is not None:
            hidden |= at[:, None] // chunk != at[None, :] // chunk
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(nodes), 1)], -1)
        weights = scores.softmax(-1)[..., : len(nodes)]
        outs.append((weights @ values).transpose(0, 1))
    return torch.cat(outs)


def logprobs_of_edges(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: Sequence[int],  # [E]
    rows: Sequence[int],  # [E]
    *,
    bias: torch.Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # [E], [N]
    """Log-probs of the targets and the entropy of every row, one row at a time."""
    log_probabilities = []
    for row in range(len(hidden)):
        logits = weight @ hidden[row]
        logits = logits if bias is None else logits + bias
        logits = (logits if softcap is None else (logits / softcap).tanh() * softcap) / temperature
        log_probabilities.append(logits - torch.logsumexp(logits, 0))
    logprobs = [log_probabilities[row][target] for row, target in zip(rows, targets, strict=True)]
    entropy = [-(one.exp() * one).sum() for one in log_probabilities]
    empty = hidden.new_zeros(0)
    return torch.stack(logprobs) if logprobs else empty, torch.stack(entropy) if entropy else empty


def preference_loss_of_pairs(
    policy_logprobs: torch.Tensor,  # [T]
    reference_logprobs: torch.Tensor | None,  # [T]
    mask: Sequence[bool],  # [T]
    cu_seqlens: Sequence[int],  # [R+1]
    pairs: Sequence[tuple[int, int]],
    preference: Sequence[float],
    *,
    beta: float,
) -> torch.Tensor:  # [P]
    """p log(1 + exp(-x)) + (1 - p) log(1 + exp(x)), one pair at a time."""

    def margin(rollout: int) -> torch.Tensor:
        counted = [t for t in range(cu_seqlens[rollout], cu_seqlens[rollout + 1]) if mask[t]]
        total = policy_logprobs[counted].sum()
        return total if reference_logprobs is None else total - reference_logprobs[counted].sum()

    losses = [policy_logprobs.new_zeros(0)]
    for (i, j), p in zip(pairs, preference, strict=True):
        x = beta * (margin(i) - margin(j))
        zero = torch.zeros_like(x)
        losses.append((p * torch.logaddexp(zero, -x) + (1 - p) * torch.logaddexp(zero, x))[None])
    return torch.cat(losses)


def preference_loss_of_rollouts(
    hidden: torch.Tensor,  # [U, D]
    weight: torch.Tensor,  # [V, D]
    forest: PackedForest,
    pairs: Sequence[tuple[int, int]],
    preference: Sequence[float],
    *,
    reference_logprobs: torch.Tensor | None = None,  # [T]
    beta: float,
) -> torch.Tensor:  # [P]
    """The same from hidden states, each rollout's log-probs computed for itself and nothing left out."""
    logprobs = [hidden.new_zeros(0)]
    for rollout in range(forest.num_rollouts):
        nodes = _nodes(forest, rollout)
        if len(nodes):
            rows = hidden[nodes[:-1]] @ weight.T
            targets = torch.from_numpy(forest.tokens).to(hidden.device)[nodes[1:]]
            taken = torch.log_softmax(rows, -1)[torch.arange(len(targets), device=hidden.device), targets]
            logprobs += [hidden.new_zeros(1), taken]
    return preference_loss_of_pairs(
        torch.cat(logprobs), reference_logprobs, forest.trained.tolist(), forest.cu_seqlens.tolist(),
        pairs, preference, beta=beta,
    )  # fmt: skip


def surrogate_of_tokens(
    policy_logprobs: torch.Tensor,  # [T]
    old_logprobs: Sequence[float],  # [T]
    advantages: Sequence[float],  # [T]
    weights: Sequence[float],  # [T]
    reference_logprobs: Sequence[float] | None,  # [T]
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float = 0.0,
) -> torch.Tensor:  # [T]
    """The clipped surrogate by its cases, one token at a time; tokens of weight 0 are not looked at."""
    losses = [policy_logprobs.new_zeros(0)]
    for t, weight in enumerate(weights):
        if weight == 0:
            losses.append(policy_logprobs.new_zeros(1))
            continue
        ratio, advantage = (policy_logprobs[t] - old_logprobs[t]).exp(), advantages[t]
        if advantage > 0 and ratio > 1 + clip_high:
            ratio = torch.full_like(ratio, 1 + clip_high)
        elif advantage < 0 and ratio < 1 - clip_low:
            ratio = torch.full_like(ratio, 1 - clip_low)
        loss = -ratio * advantage
        if reference_logprobs is not None:
            d = reference_logprobs[t] - policy_logprobs[t]
            loss = loss + kl_weight * (d.exp() - d - 1)
        losses.append((weight * loss)[None])
    return torch.cat(losses)


def _nodes(forest: PackedForest, rollout: int) -> torch.Tensor:
    return torch.from_numpy(forest.node_index[forest.cu_seqlens[rollout] : forest.cu_seqlens[rollout + 1]])
