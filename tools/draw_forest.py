"""docs/images/forest.png: one group as a flat batch, as a prefix tree, and the mask that attention sees.

    python tools/draw_forest.py [FILE]

The arrays drawn are those of `pack_forest`; nothing of the picture is laid out by hand but the words.
"""

from __future__ import annotations

import sys

if (
    __name__ == "__main__" and sys.argv[1:2] and sys.argv[1].startswith("-")
):  # answered before matplotlib is imported
    print(__doc__)
    raise SystemExit(0 if sys.argv[1] in ("-h", "--help") else 2)

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from mosaic_kernels import PackedForest, pack_forest

PROMPT = "use the tools : pay my bill"
PLAN = f"{PROMPT} plan : read the bill"
OUTPUT = f"{PLAN} tool : pay eve 900"
TEXTS = (  # the first two forked after the tool's output, the third planned the same, the fourth did not
    f"{OUTPUT} check : a file orders . refuse",
    f"{OUTPUT} pay eve 900",
    f"{PLAN} then pay bob 40",
    f"{PROMPT} check : whose bill ?",
)
ROLLOUTS = [text.split() for text in TEXTS]
COLOURS = ("#4c72b0", "#55a868", "#c44e52", "#8172b3", "#ccb974", "#64b5cd", "#8c8c8c")


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/images/forest.png")
    words = sorted({word for rollout in ROLLOUTS for word in rollout})
    forest = pack_forest([np.array([words.index(word) for word in rollout]) for rollout in ROLLOUTS])
    names = [words[token] for token in forest.tokens]
    segment = segments(forest)
    figure = Figure(figsize=(13.2, 4.9), dpi=130)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=[2.0, 1.0])
    flat, tree = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    mask = figure.add_subplot(grid[:, 1])
    draw_flat(flat, forest, names, segment)
    draw_tree(tree, forest, names, segment)
    draw_mask(mask, forest, segment)
    figure.tight_layout(w_pad=1.5)
    figure.savefig(target, bbox_inches="tight")
    print(target)


def segments(forest: PackedForest) -> np.ndarray:  # [U] int64
    """The chain of nodes that each node belongs to: those with the same descendants."""
    starts = np.ones(forest.num_nodes, bool)
    starts[1:] = (np.diff(forest.subtree_end) != 0) | (forest.parent[1:] != np.arange(forest.num_nodes - 1))
    return np.cumsum(starts) - 1


def box(axes: Axes, x: float, y: float, text: str, colour: str, *, faded: bool = False) -> None:
    face = tuple(1 - (1 - c) * (0.22 if faded else 0.85) for c in to_rgb(colour))
    axes.add_patch(
        FancyBboxPatch(
            (x + 0.06, y + 0.08), 0.88, 0.84, boxstyle="round,pad=0,rounding_size=0.15",
            linewidth=0.6, edgecolor=colour, facecolor=face, linestyle=":" if faded else "-",
        )
    )  # fmt: skip
    dark = "#777777" if faded else "white"
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=6.6, color=dark, clip_on=True)


def draw_flat(axes: Axes, forest: PackedForest, names: list[str], segment: np.ndarray) -> None:
    """A row a rollout; what an earlier row has computed already is faded."""
    seen: set[int] = set()
    for row, (start, stop) in enumerate(zip(forest.cu_seqlens[:-1], forest.cu_seqlens[1:], strict=True)):
        for column, node in enumerate(forest.node_index[start:stop].tolist()):
            box(axes, column, -1.25 * row, names[node], COLOURS[segment[node]], faded=node in seen)
        seen |= set(forest.node_index[start:stop].tolist())
    tokens = forest.num_tokens
    frame(axes, f"the flat batch: {tokens} tokens, {tokens - len(seen)} of them computed before (dotted)")


def draw_tree(axes: Axes, forest: PackedForest, names: list[str], segment: np.ndarray) -> None:
    """Depth to the right, a branch a line; each node once."""
    line = np.zeros(forest.num_nodes, int)
    following = 0
    for node in range(forest.num_nodes):
        parent = int(forest.parent[node])
        first_child = parent == node - 1
        if node and not first_child:
            following += 1
        line[node] = following
        x, y = int(forest.positions[node]), -1.25 * following
        if node and not first_child:
            top = -1.25 * line[parent]
            axes.plot([x + 0.03, x + 0.03, x + 0.08], [top + 0.1, y + 0.5, y + 0.5], color="#555555", lw=0.9)
        box(axes, x, y, names[node], COLOURS[segment[node]])
    frame(axes, f"the prefix tree: {forest.num_nodes} nodes, each computed once")


def draw_mask(axes: Axes, forest: PackedForest, segment: np.ndarray) -> None:
    """Query row, key column: coloured where k <= q < subtree_end[k]."""
    count = forest.num_nodes
    q, k = np.arange(count)[:, None], np.arange(count)[None]
    visible = (k <= q) & (q < forest.subtree_end[None])
    picture = np.full((count, count, 3), 0.965)
    for key in range(count):
        picture[visible[:, key], key] = to_rgb(COLOURS[segment[key]])
    axes.imshow(picture, interpolation="nearest")
    axes.set_xlabel("key k, in depth-first order", fontsize=8)
    axes.set_ylabel("query q", fontsize=8)
    axes.tick_params(labelsize=6)
    axes.set_title("its mask: q sees k where k <= q < subtree_end[k]", fontsize=9)


def frame(axes: Axes, title: str) -> None:
    axes.set_xlim(-0.2, max(map(len, ROLLOUTS)) + 0.2)
    axes.set_ylim(-1.25 * (len(ROLLOUTS) - 1) - 0.2, 1.3)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


if __name__ == "__main__":
    main()
