"""Predict an update's time on more ranks than there are: `python -m tools.simulate [--options]`.

A simulation, not a measurement. The rollouts of a made-up step are spread over the ranks by the code that
training uses, each rank's forwards are those it would run, and their time is the cost model's. The traffic of
FSDP2 is counted in bytes and divided by a bandwidth.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a mistake are answered before transformers is imported
    from mosaic_fast.cli import answer_at_once
    from tools.simulate_arguments import parse

    answer_at_once(parse)

import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import cast

import numpy as np
from rich.table import Table
from transformers import AutoConfig, Qwen3Config

from mosaic_fast.cli import plain_console, run_cli
from mosaic_fast.errors import UserError
from mosaic_fast.learner.execution import CostModel, load_cost_model
from mosaic_fast.learner.execution.cost import node_seconds, sharding_bytes, share_of, shares, work_of
from mosaic_fast.learner.execution.execution import longest_first
from mosaic_fast.learner.execution.schedule import Forward, cut, unmerged, whole
from mosaic_kernels import PackedForest, pack_forest
from mosaic_kernels.forest.ideal import ModelShape
from tools.simulate_arguments import Arguments, parse

FLOPS = 6.0  # of a multiply-add, forward and backward


@dataclass(frozen=True)
class Prediction:
    """An update on `ranks` ranks, in seconds."""

    ranks: int
    compute_s: float  # of the slowest rank in each forward
    balance: float  # of the ranks' time, the share in which they compute
    forwards: int  # that every rank runs
    traffic_s: float  # of all collectives of those forwards

    @property
    def overlapped_s(self) -> float:
        """Traffic hidden behind computing as far as it can be."""
        return max(self.compute_s, self.traffic_s)

    @property
    def serial_s(self) -> float:
        """Traffic beside computing, with nothing of it hidden."""
        return self.compute_s + self.traffic_s


def made_up_step(tasks: int, group_size: int, seed: int) -> PackedForest:
    """Groups of long rollouts of unequal length; a system prompt is common to all, a task's to its group.

    1,500 system tokens, 200 to 800 of the task, then 2 to 10 turns of 60 to 180 sampled tokens and an
    observation of 40 to 400.
    """
    random = np.random.default_rng(seed)
    system = random.integers(0, 1000, 1500)
    sequences, trained = [], []
    for _ in range(tasks):
        prompt = np.append(system, random.integers(0, 1000, random.integers(200, 801)))
        for _ in range(group_size):
            pieces, masks = [prompt], [np.zeros(len(prompt), np.bool_)]
            for _ in range(int(random.integers(2, 11))):
                for sampled, low, high in ((True, 60, 181), (False, 40, 401)):
                    piece = random.integers(0, 1000, random.integers(low, high))
                    pieces.append(piece)
                    masks.append(np.full(len(piece), sampled))
            sequences.append(np.concatenate(pieces))
            trained.append(np.concatenate(masks))
    return pack_forest(sequences, trained)


def predict(
    forest: PackedForest, shape: ModelShape, cost: CostModel, ranks: int, arguments: Arguments
) -> Prediction:
    """The update of a step: one pass forward and backward over each rank's share.

    The ranks meet in every forward, so each one takes as long as on the slowest rank.
    """
    seconds = node_seconds(forest, shape, cost)
    own = [share_of(forest, rollouts) for rollouts in shares(forest, seconds, ranks)]
    parts = [_cheapest(share, shape, cost, arguments.tokens_per_microbatch) for share in own]
    times = [[cost.predict(work_of([part], shape)) for part in longest_first(p, shape, cost)] for p in parts]
    forwards = max(len(one) for one in times)
    compute_s = sum(max(one[k] for one in times if k < len(one)) for k in range(forwards))
    return Prediction(
        ranks,
        compute_s,
        sum(map(sum, times)) / ranks / compute_s,
        forwards,
        forwards * traffic_s(shape, ranks, arguments.gigabytes_per_s, arguments.latency_us),
    )


def traffic_s(shape: ModelShape, ranks: int, gigabytes_per_s: float, latency_us: float) -> float:
    """Seconds of a forward and backward pass's collectives on rings.

    A ring moves (N - 1) / N of the bytes through each rank, in N - 1 steps.
    """
    if ranks == 1:
        return 0.0
    collectives = 3 * shape.num_hidden_layers + 2
    moving = sharding_bytes(shape) * (ranks - 1) / ranks / (gigabytes_per_s * 1e9)
    return moving + collectives * (ranks - 1) * latency_us * 1e-6


def _cheapest(share: PackedForest, shape: ModelShape, cost: CostModel, budget: int) -> tuple[Forward, ...]:
    """The forwards that a rank's `Execution` would choose for its share of the forest."""
    shared = whole(share) if share.num_nodes <= budget else cut(share, budget)
    return min((shared, cut(unmerged(share), budget)), key=lambda parts: cost.predict(work_of(parts, shape)))


_QWEN3_4B = cast(
    ModelShape,
    Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
)


def _shape(model: str) -> ModelShape:
    if model == "qwen3-4b":
        return _QWEN3_4B
    if not (Path(model) / "config.json").is_file():
        raise UserError(f"model: {model} is not a folder with a config.json, and not qwen3-4b")
    return AutoConfig.from_pretrained(model, local_files_only=True)


def _scaled(cost: CostModel, tflops: float) -> CostModel:
    if not tflops:
        return cost
    factor = FLOPS / (tflops * 1e12) / cost.linear
    return CostModel(*(factor * value for value in astuple(cost)))


def main() -> int:
    arguments = parse()
    for name in ("gigabytes_per_s", "tasks", "group_size"):
        if not getattr(arguments, name) > 0:
            raise UserError(f"{name} = {getattr(arguments, name)} must be above 0")
    if not arguments.ranks or min(arguments.ranks) < 1:
        raise UserError(f"ranks = {arguments.ranks} must be numbers of 1 or more")
    shape, cost = _shape(arguments.model), load_cost_model(arguments.cost_model)
    cost = _scaled(cost, arguments.tflops)
    forest = made_up_step(arguments.tasks, arguments.group_size, arguments.seed)
    longest = int(np.diff(forest.cu_seqlens).max())
    if longest > arguments.tokens_per_microbatch:
        raise UserError(f"tokens_per_microbatch must be {longest} or more, the longest rollout of this step")
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=110)  # a file has no width to fold at
    console.print(
        f"SIMULATED update: {forest.num_rollouts} rollouts, {forest.num_tokens} tokens, {forest.num_nodes} "
        f"distinct; {FLOPS / cost.linear / 1e12:.3g} TFLOP/s a rank, {arguments.gigabytes_per_s:g} GB/s",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    for head in (
        "ranks",
        "compute s",
        "balance",
        "forwards",
        "traffic s",
        "update s",
        "speed-up",
        "efficiency",
    ):
        table.add_column(head, justify="right")
    alone = predict(forest, shape, cost, 1, arguments)
    for ranks in arguments.ranks:
        one = predict(forest, shape, cost, ranks, arguments)
        best, worst = alone.compute_s / one.overlapped_s, alone.compute_s / one.serial_s
        table.add_row(
            str(ranks),
            f"{one.compute_s:.3g}",
            f"{one.balance:.1%}",
            str(one.forwards),
            f"{one.traffic_s:.3g}",
            f"{one.overlapped_s:.3g} - {one.serial_s:.3g}",
            f"{worst:.1f} - {best:.1f}",
            f"{worst / ranks:.0%} - {best / ranks:.0%}",
        )
    console.print(table)
    console.print("update s: traffic hidden behind computing, to nothing hidden. Nothing here was run.")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
