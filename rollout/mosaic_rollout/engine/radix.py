"""A radix tree over token ids whose nodes name the slots of their tokens' keys and values.

RadixAttention (Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", 2024):
every prefix ever computed stays findable until it is evicted, least recently used leaf first.

    insert 1 2 3 4, then 1 2 5:    root -- [1 2] -+- [3 4]
                                                  +- [5]
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

import numpy as np

from mosaic_rollout.engine.recurrent import States
from mosaic_rollout.engine.rows import KeyValuePool


class Node:
    """A run of tokens below `parent`. Not `ready`: slots are taken, keys and values not yet computed."""

    __slots__ = ("children", "last_used", "locks", "parent", "ready", "slots", "start", "states", "tokens")

    def __init__(
        self, parent: Node | None, start: int, tokens: np.ndarray, slots: np.ndarray, ready: bool
    ) -> None:
        self.parent = parent
        self.start = start  # position of its first token
        self.tokens = tokens  # [n] int64
        self.slots = slots  # [n] int64
        self.ready = ready
        self.children: dict[int, Node] = {}  # by first token
        self.locks = 0
        self.last_used = 0
        self.states: Mapping[int, States] | None = None  # of recurrent layers behind its last token, if kept

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def path(self) -> list[Node]:
        """The nodes from below the root down to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class RadixTree:
    """Prefixes and their slots. At most `max_tokens` stay once nothing is locked (see `evict`).

    Kept states of recurrent layers count as the tokens whose keys and values would take their memory.
    """

    def __init__(self, pool: KeyValuePool, max_tokens: int) -> None:
        self.pool = pool
        self.max_tokens = max_tokens
        self.clear()

    def clear(self, *, release: bool = True) -> None:
        """Empty the tree and the pool; `release` gives the pool's memory back."""
        self.pool.clear(release=release)
        nothing = np.empty(0, np.int64)
        self.root = Node(None, 0, nothing, nothing, ready=True)
        self._clock = 0

    def keep_states(self, node: Node, states: Mapping[int, States]) -> None:
        """Remember the states behind a node's last token: a later sequence may go on from there."""
        self.pool.kept_states += node.states is None
        node.states = states

    def without_states(self, node: Node) -> int:
        """Have what is behind the last states kept on the path computed again: the number of its tokens."""
        tokens = 0
        for above in reversed(node.path() if self.pool.shape.states else []):
            if above.states is not None:
                break
            if above.ready:
                above.ready = False
                tokens += len(above.tokens)
        return tokens

    def match(self, tokens: np.ndarray) -> Node:
        """The node where the longest known prefix of `tokens` [L] ends; a node it ends inside of is split."""
        self._clock += 1
        node = self.root
        while node.end < len(tokens):
            child = node.children.get(int(tokens[node.end]))
            if child is None:
                break
            rest = tokens[child.start : child.end]
            differs = child.tokens[: len(rest)] != rest
            common = int(differs.argmax()) if differs.any() else len(rest)
            node = child if common == len(child.tokens) else self._split(child, common)
            node.last_used = self._clock
            if common < len(rest):
                break
        return node

    def extend(self, node: Node, tokens: np.ndarray, *, ready: bool) -> Node:
        """Append tokens [L] (all of the sequence) below `node`, where its match ended."""
        if node.end == len(tokens):
            return node
        new = tokens[node.end :].copy()
        child = Node(node, node.end, new, self.pool.allocate(len(new)), ready)
        child.last_used = self._clock
        node.children[int(new[0])] = child
        return child

    def lock(self, node: Node, change: int = 1) -> None:
        """Keep the path down to `node` from eviction; `change=-1` takes the lock back."""
        for ancestor in node.path():
            ancestor.locks += change

    def evict(self, room: int = 0) -> None:
        """Drop least recently used unlocked leaves until `room` more tokens fit below max_tokens.

        Sixteenths of the whole are freed at a time, so that a full tree is not walked at every insertion.
        """
        if self.pool.filled + room <= self.max_tokens:
            return
        target = max(0, self.max_tokens - room - self.max_tokens // 16)
        heap = [
            (n.last_used, order, n) for order, n in enumerate(self.nodes()) if not n.children and not n.locks
        ]
        heapq.heapify(heap)
        order = len(heap) + self.pool.used  # above every number given so far
        while heap and self.pool.filled > target:
            _, _, leaf = heapq.heappop(heap)
            parent = leaf.parent
            assert parent is not None
            self.pool.release(leaf.slots)
            self.pool.kept_states -= leaf.states is not None
            del parent.children[int(leaf.tokens[0])]
            if parent is not self.root and not parent.children and not parent.locks:
                order += 1
                heapq.heappush(heap, (parent.last_used, order, parent))

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _split(self, node: Node, count: int) -> Node:
        """Cut `node` after its first `count` tokens; returns the new upper part.

        The lower part stays the same object, so whoever holds the end of a path still holds it.
        """
        upper = Node(node.parent, node.start, node.tokens[:count], node.slots[:count], node.ready)
        upper.locks, upper.last_used = node.locks, node.last_used
        upper.children[int(node.tokens[count])] = node
        assert node.parent is not None
        node.parent.children[int(node.tokens[0])] = upper
        node.parent, node.start = upper, node.start + count
        node.tokens, node.slots = node.tokens[count:], node.slots[count:]
        return upper
