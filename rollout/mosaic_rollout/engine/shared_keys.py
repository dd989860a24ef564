"""Keys that several rows have in common, read once a decode step for all of them.

A row alone streams its whole prefix past one query. Rows that share a prefix are the queries of one matrix
product with it, as in Hydragen (Juravsky et al., arXiv 2402.05099): what is left to a row is what it alone
knows. Prefixes form a tree, which is cut at some depths into levels, each with the groups of rows that agree
up to its end:

    rows  1 2 3 4,  1 2 3 5,  1 9 9    level [0, 1): one group of three; level [1, 3): one of two, one of one

How many levels pay is counted: keys that are read, queries that pad the groups to one width, and calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CALLS_BYTES = 1_500_000
"""Bytes of keys and values whose reading takes as long as the calls of a level."""


@dataclass(frozen=True)
class Cut:
    """Tokens [start, end) of all prefixes, and which rows agree on them and on all tokens before."""

    start: int
    end: int
    groups: tuple[tuple[int, ...], ...]  # of rows


def cuts_of(
    prefixes: Sequence[np.ndarray],  # [L_i] int64 a row, known to the cache
    *,
    key_bytes: int,  # of a token's key and value, all heads of a layer
    queries_per_key: int,  # query heads that share a key head
) -> list[Cut]:
    """The levels that make a decode step cheapest, by count; none where sharing does not pay.

    They reach no further than the shortest prefix.
    """
    rows, length = len(prefixes), min((len(prefix) for prefix in prefixes), default=0)
    if rows < 2 or (rows - 1) * length * key_bytes <= CALLS_BYTES:
        return []
    tokens = np.stack([prefix[:length] for prefix in prefixes])
    words = tokens.astype(">i8")
    order = np.array(sorted(range(rows), key=lambda row: words[row].tobytes()))
    differs = tokens[order[1:]] != tokens[order[:-1]]
    agree = np.where(differs.any(axis=1), differs.argmax(axis=1), length)  # [rows - 1] tokens, neighbours
    depths = np.unique([0, *agree.tolist(), length])
    product = queries_per_key / 8  # of a query with a key, in readings of a key
    calls = CALLS_BYTES / key_bytes
    # cheapest[i]: what tokens [0, depths[i]) cost beyond being read by every row
    cheapest, before = np.zeros(len(depths)), np.zeros(len(depths), np.int64)
    for index in range(1, len(depths)):
        ends = np.append(np.flatnonzero(agree < depths[index]), rows - 1)
        count, width = len(ends), int(np.diff(ends, prepend=-1).max())
        a_token = count + (count * width - rows) * product - rows
        costs = cheapest[:index] + a_token * (depths[index] - depths[:index]) + calls
        before[index] = costs.argmin()
        cheapest[index] = costs[before[index]]
    last = int(cheapest.argmin())
    cuts: list[Cut] = []
    while last > 0:
        first, end = int(before[last]), int(depths[last])
        groups = np.split(order, np.flatnonzero(agree < end) + 1)
        cuts.append(Cut(int(depths[first]), end, tuple(tuple(group.tolist()) for group in groups)))
        last = first
    return cuts[::-1]


class Level:
    """Keys and values of a cut, one copy a group."""

    def __init__(self, cut: Cut, keys: Tensor, values: Tensor) -> None:
        """keys [layers, rows, Hkv, tokens, Dk] and values of all rows."""
        self.start, self.end = cut.start, cut.end
        self._groups, self._width = len(cut.groups), max(len(group) for group in cut.groups)
        firsts = torch.tensor([group[0] for group in cut.groups], device=keys.device)
        self._keys, self._values = (
            list(whole[:, :, :, cut.start : cut.end].index_select(1, firsts).flatten(1, 2).unbind(0))
            for whole in (keys, values)
        )  # [groups Hkv, S, D] a layer
        members = np.zeros((self._groups, self._width), np.int64)  # what pads a group computes row 0
        place = np.zeros(sum(len(group) for group in cut.groups), np.int64)
        for number, group in enumerate(cut.groups):
            members[number, : len(group)] = group
            place[list(group)] = number * self._width + np.arange(len(group))
        self._members, self._place = (torch.from_numpy(a).to(keys.device) for a in (members.ravel(), place))
        self._in_order = self._groups == 1 and bool((place == np.arange(len(place))).all())

    def scores(self, layer: int, query: Tensor, scale: float) -> Tensor:  # [n, Hkv, G, D] -> [n, Hkv, G, S]
        return self._by_row(_products(self._by_group(query), self._keys[layer], scale), query)

    def attended(self, layer: int, weights: Tensor) -> Tensor:  # [n, Hkv, G, S] -> [n, Hkv, G, Dv]
        return self._by_row(torch.bmm(self._by_group(weights), self._values[layer]), weights)

    def _by_group(self, of_rows: Tensor) -> Tensor:
        """[n, Hkv, G, *] -> [groups Hkv, width G, *]"""
        if not self._in_order:
            of_rows = of_rows.index_select(0, self._members)
        _, heads, queries, size = of_rows.shape
        split = of_rows.reshape(self._groups, -1, heads, queries, size).transpose(1, 2)
        return split.reshape(self._groups * heads, -1, size)

    def _by_row(self, of_groups: Tensor, like: Tensor) -> Tensor:
        """[groups Hkv, width G, *] -> [n, Hkv, G, *]"""
        _, heads, queries, _ = like.shape
        split = of_groups.view(self._groups, heads, self._width, queries, -1).transpose(1, 2)
        return split.flatten(0, 1) if self._in_order else split.flatten(0, 1).index_select(0, self._place)


class SharedKeys:
    """The levels of the rows that are being sampled, until one enters or leaves."""

    def __init__(self, cuts: Sequence[Cut], keys: Tensor, values: Tensor) -> None:
        self._levels = [Level(cut, keys, values) for cut in cuts]
        self.end = cuts[-1].end if cuts else 0
        """From this token on every row reads keys of its own."""

    def attend(
        self,
        layer: int,
        query: Tensor,  # [n, Hkv, G, Dk]
        keys: Tensor,  # [n, Hkv, K, Dk] of the layer's rows
        values: Tensor,  # [n, Hkv, K, Dv]
        mask: Tensor | None,  # [n, 1, 1, K - end], additive
        scale: float,
    ) -> Tensor:  # [n, Hkv, G, Dv]
        """softmax(scale query keys^T + mask) values, where the first `end` keys come from the levels."""
        rows, heads, queries, _ = query.shape
        own_keys, own_values = keys[:, :, self.end :].flatten(0, 1), values[:, :, self.end :].flatten(0, 1)
        own = _products(query.flatten(0, 1), own_keys, scale).view(rows, heads, queries, -1)
        if mask is not None:
            own += mask
        if not self._levels:
            return torch.bmm(own.softmax(-1).flatten(0, 1), own_values).view(rows, heads, queries, -1)
        scores = [level.scores(layer, query, scale) for level in self._levels]
        weights = torch.cat([*scores, own], -1).softmax(-1)
        out = torch.bmm(weights[..., self.end :].flatten(0, 1), own_values).view(rows, heads, queries, -1)
        for level in self._levels:
            out += level.attended(layer, weights[..., level.start : level.end])
        return out


def _products(query: Tensor, keys: Tensor, scale: float) -> Tensor:  # [B, t, D], [B, S, D] -> [B, t, S]
    """scale query keys^T"""
    unread = query.new_empty(1, 1, 1).expand(*query.shape[:2], keys.shape[1])
    return torch.baddbmm(unread, query, keys.mT, beta=0, alpha=scale)
