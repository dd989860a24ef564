"""What a schedule costs: its work counted exactly, times coefficients that come from a file.

The counts are those of `ModelSizes`. Choosing a plan, sharing a step's rollouts out over ranks, calibrating
(`learner/calibrate/`), simulating ranks (`tools/simulate.py`) and the plan on paper (`bench/gpu_plan.py`) all
read this one model.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, astuple, dataclass, fields, replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mosaic_fast.errors import UserError
from mosaic_fast.learner.execution.schedule import Forward
from mosaic_fast.policy.forest_tensors import IntArray
from mosaic_kernels import PackedForest, pack_forest
from mosaic_kernels.forest.ideal import ModelShape, ModelSizes, predicting
from mosaic_kernels.forest.layout import BoolArray

DEFAULT = "default"
RUN_FILE = "cost.toml"  # in the run folder
_EARLIER_NAMES = {"held": "kept"}  # coefficients in files of earlier versions
BFLOAT16, FLOAT32 = 2, 4  # bytes of a number
_EARLIER, _LAST = slice(0, -1), slice(-1, None)  # layers


@dataclass(frozen=True)
class Work:
    """What a forward and backward pass over a schedule does; multiply-adds are those of its forward."""

    linear: float  # multiply-adds of projections and MLPs
    attention: float  # multiply-adds of scores and weighted sums, over visible pairs
    head: float  # multiply-adds of the LM head
    layer_calls: float  # layers x forwards
    kept: float  # numbers copied: keys and values of kept nodes, for each forward that stands on them
    weights: float  # weights x forwards: each forward reads them all and adds to the gradients of all


@dataclass(frozen=True)
class CostModel:
    """Seconds a unit of each kind of work, forward and backward together."""

    linear: float
    attention: float
    head: float
    layer_calls: float
    kept: float
    weights: float = 0.0  # a file may lack it

    def predict(self, work: Work) -> float:
        """Seconds of one forward and backward pass."""
        return sum(a * b for a, b in zip(astuple(self), astuple(work), strict=True))


def work_of(parts: Sequence[Forward], shape: ModelShape) -> Work:
    """Count a schedule's work. The last layer's queries, output projection and MLP run on needed rows."""
    sizes = ModelSizes.of(shape)
    linear = attention = head = kept = 0.0
    masks: dict[int, BoolArray] = {}  # the forwards of one forest share its mask
    for part in parts:
        forest, nodes = part.forest, part.nodes
        visible = (forest.positions if nodes is None else forest.positions[nodes]) + 1  # [U] keys a node sees
        if id(forest) not in masks:
            masks[id(forest)] = predicting(forest)
        mask = masks[id(forest)]
        rows = np.flatnonzero(mask) if nodes is None else nodes[mask[nodes]]
        linear += (sizes.layers - 1) * sizes.layer * len(visible)
        linear += sizes.on_keys * len(visible) + sizes.on_queries * len(rows)
        attention += sizes.attention(visible, _EARLIER)
        attention += sizes.attention(forest.positions[rows] + 1, _LAST)
        head += float(sizes.head * len(rows))
        if part.parent >= 0:
            kept += 2.0 * sizes.keys * sizes.layers * (int(visible[0]) - 1)
    weights = float(len(parts) * (sizes.layers * sizes.layer + sizes.head))
    return Work(linear, attention, head, float(sizes.layers * len(parts)), kept, weights)


def node_seconds(forest: PackedForest, shape: ModelShape, cost: CostModel) -> NDArray[np.float64]:  # [U]
    """Seconds that each node adds to a pass: all costs but those that a forward has whatever its size."""
    sizes, visible = ModelSizes.of(shape), forest.positions + 1
    pairs = [visible if window is None else np.minimum(visible, window) for window in sizes.windows]
    earlier = sum(pairs[:-1], np.zeros(forest.num_nodes))
    seconds = cost.linear * ((sizes.layers - 1) * sizes.layer + sizes.on_keys)
    seconds = seconds + cost.attention * 2.0 * sizes.queries * earlier
    on_row = cost.linear * sizes.on_queries + cost.head * sizes.head
    on_row = on_row + cost.attention * 2.0 * sizes.queries * pairs[-1]
    return (seconds + np.where(predicting(forest), on_row, 0.0)).astype(np.float64)


def sharding_bytes(shape: ModelShape) -> float:
    """Bytes of all weights and gradients that FSDP2 moves in a forward and backward pass.

    Each layer's weights are gathered twice in bfloat16, for the forward and for the backward pass, those of
    embedding and head once; every gradient is scattered in fp32. On N ranks (N - 1) / N of them pass through
    each rank's link.
    """
    layers, ends = weights_of_shape(shape)
    return (2 * layers + ends) * BFLOAT16 + (layers + ends) * FLOAT32


def weights_of_shape(shape: ModelShape) -> tuple[float, float]:
    """Weights of all layers, and of embedding and head, which many models share; norms are left out."""
    sizes = ModelSizes.of(shape)
    matrices = 1 if getattr(shape, "tie_word_embeddings", False) else 2
    return float(sizes.layers * sizes.layer), float(matrices * sizes.head)


def default_cost_model() -> CostModel:
    """The shipped coefficients, of a CPU; `mosaic_fast.learner.calibrate` writes those of a machine."""
    return _parse(
        files("mosaic_fast.learner.execution").joinpath("cost.toml").read_text("utf-8"),
        "the shipped cost.toml",
    )


def load_cost_model(path: str) -> CostModel:
    """The coefficients of a file; "default" for the shipped ones. UserError where the file is not one."""
    if path == DEFAULT:
        return default_cost_model()
    try:
        return _parse(Path(path).read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise UserError(
            f"forest.cost_model: there is no file {path}; "
            f"python -m mosaic_fast.learner.calibrate --out {path} writes it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"forest.cost_model: {path} cannot be read: {error}") from None


def save_cost_model(cost: CostModel, path: Path, about: str) -> None:
    """Write the coefficients. about: what they were measured on, in words."""
    import tomli_w  # what only runs forests, and writes no file, does without

    content = {"about": about, "seconds_per_unit": asdict(cost)}
    path.write_text(tomli_w.dumps(content), encoding="utf-8")


def cost_model_of_run(folder: Path, configured: str) -> CostModel:
    """The coefficients a run began with, if it has begun; else those of the configured file."""
    own = folder / RUN_FILE
    return load_cost_model(str(own) if own.exists() else configured)


def keep_cost_model(cost: CostModel, folder: Path) -> None:
    """Put the coefficients in the run folder: a resumed run decides as it did. OSError where it fails."""
    if not (folder / RUN_FILE).exists():
        unfinished = folder / f".tmp-{RUN_FILE}"
        save_cost_model(cost, unfinished, "what this run was started with")
        unfinished.replace(folder / RUN_FILE)


def _parse(text: str, source: str) -> CostModel:
    names = {field.name for field in fields(CostModel)}
    needed = [field.name for field in fields(CostModel) if field.default is MISSING]
    try:
        values = tomllib.loads(text).get("seconds_per_unit", {})
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError; or long numbers, deep nesting
        raise UserError(f"{source} is not valid TOML: {error}") from None
    if isinstance(values, dict):
        values = {_EARLIER_NAMES.get(name, name): value for name, value in values.items()}
    if not isinstance(values, dict) or not set(needed) <= set(values) <= names:
        may = ", ".join(sorted(names - set(needed)))
        raise UserError(f"{source}: [seconds_per_unit] must hold {', '.join(needed)}, and may hold {may}")
    for name, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e300:
            raise UserError(f"{source}: {name} must be a number of seconds, 0 or more")
    if not any(values.values()):
        raise UserError(f"{source}: every coefficient is 0, so every plan would cost nothing")
    return CostModel(**{name: float(value) for name, value in values.items()})


def shares(forest: PackedForest, node_cost: NDArray[np.float64], ranks: int) -> list[IntArray]:
    """Share the rollouts out over ranks: the indices of each rank's. Empty rollouts go to none.

    Rollouts stay in depth-first order, and a rank gets a run of them: neighbours share the most. A run costs
    its first rollout whole, and of each one after it what it does not share with the one before. The dearest
    run is as cheap as this order allows.

    node_cost: [U] what each node adds to a rank that has it.

    Example: [5, 6, 7], [5, 6, 8] and [9, 9, 9] on two ranks, each node 1: [0, 1] costs 4, and [2] costs 3.
    """
    bounds, index = forest.cu_seqlens, forest.node_index
    filled = np.flatnonzero(np.diff(bounds) > 0)
    order = filled[np.argsort(index[bounds[filled + 1] - 1], kind="stable")]
    if not len(order):
        return [order] * ranks
    ahead = np.append(0.0, np.cumsum(node_cost[index]))  # what the tokens before each one cost
    whole = ahead[bounds[order + 1]] - ahead[bounds[order]]
    added = whole.copy()
    for number, (before, rollout) in enumerate(pairwise(order.tolist()), 1):
        path = index[bounds[rollout] : bounds[rollout + 1]]
        shared = int(np.searchsorted(path, index[bounds[before + 1] - 1], side="right"))
        added[number] = ahead[bounds[rollout + 1]] - ahead[bounds[rollout] + shared]
    low, high = float(whole.max()), float(whole[0] + added[1:].sum())
    starts = _runs(whole, added, high)
    for _ in range(60):  # halving: as exact as the costs are
        if high <= low:
            break
        middle = (low + high) / 2
        tried = _runs(whole, added, middle)
        if len(tried) <= ranks:
            starts, high = tried, middle
        else:
            low = middle
    ends = [*starts[1:], len(order)]
    found = [np.sort(order[start:end]) for start, end in zip(starts, ends, strict=True)]
    return found + [order[:0]] * (ranks - len(found))


def share_of(forest: PackedForest, rollouts: IntArray) -> PackedForest:
    """The forest of some rollouts; its `source` is the index of each of their tokens in the whole one."""
    bounds = forest.cu_seqlens
    spans = [np.arange(bounds[r], bounds[r + 1]) for r in rollouts.tolist()]
    source = np.concatenate(spans) if spans else np.zeros(0, np.int64)
    tokens = forest.tokens[forest.node_index]
    packed = pack_forest([tokens[span] for span in spans], [forest.trained[span] for span in spans])
    outer = source if forest.source is None else forest.source[source]
    return replace(packed, source=outer)


def _runs(whole: NDArray[np.float64], added: NDArray[np.float64], most: float) -> list[int]:
    """Where runs of rollouts begin if each run is as long as a cost of at most `most` allows."""
    starts, cost = [0], float(whole[0])
    for number in range(1, len(whole)):
        cost += float(added[number])
        if cost > most:
            starts.append(number)
            cost = float(whole[number])
    return starts
