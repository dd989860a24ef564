"""A plan on paper: what a 7B training step costs at least on H100s. python bench/gpu_plan.py

PREDICTED from formulas; nothing here was run on a GPU. Qwen2.5-7B's shape; 16 groups of 8 agent trajectories.

    operations  multiply-adds of linear layers, attention and LM head (as `cost.py` counts them), times 2,
                times the products of forward and backward: forward, forward again (activation
                checkpointing), for inputs and for weights. LoRA's frozen weights need no gradient: one
                product less. Attention's backward has 5 products beside the forward's 2
    bytes       every linear layer's input, output and weights once a product, bf16; Q, K, V and output of
                attention; AdamW with fp32 master weights: 28 bytes a parameter
    links       FSDP: weights gathered in bf16 for forward and backward, gradients scattered in fp32, once
                a micro-batch; overlapped with computation, so the longer of both counts
    floor       sum over parts of the longer of operations / peak and bytes / bandwidth
"""

from __future__ import annotations

import sys

if (
    __name__ == "__main__" and len(sys.argv) > 1
):  # it takes no options; --help is answered before slow imports
    print(__doc__)
    raise SystemExit(0 if sys.argv[1] in ("-h", "--help") else 2)

from dataclasses import dataclass

from workloads import agent_rollouts

from mosaic_fast.learner.execution.cost import BFLOAT16, Work, sharding_bytes, weights_of_shape, work_of
from mosaic_fast.learner.execution.schedule import unmerged, whole
from mosaic_kernels import PackedForest, pack_forest
from mosaic_kernels.forest.ideal import ModelShape, ModelSizes, predicting

PEAK_FLOP_PER_S = 989e12  # H100 SXM, bf16, dense (NVIDIA's data sheet)
MEMORY_BYTES_PER_S = 3.35e12
LINK_BYTES_PER_S = 450e9  # NVLink, one direction
MEMORY_GB = 80
MICROBATCH_TOKENS = 16_384  # a GPU
GROUPS, GROUP_SIZE = 16, 8
LORA_RANK = 32


@dataclass
class Qwen7B:
    """The shape of Qwen2.5-7B, as in its config.json."""

    vocab_size: int = 152_064
    hidden_size: int = 3584
    intermediate_size: int = 18_944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4


def step_forest() -> PackedForest:
    """16 groups of 8 agent trajectories; groups share nothing."""
    rollouts = [agent_rollouts(152_064, seed=group) for group in range(GROUPS)]
    sequences = [s for group, _ in rollouts for s in group]
    return pack_forest(sequences, [m for _, group in rollouts for m in group])


@dataclass(frozen=True)
class Cost:
    """One step's operations and bytes, and the shortest time for them on `gpus`."""

    tokens: int
    tera_operations: float
    giga_bytes: float
    link_giga_bytes: float  # a GPU
    floor_s: float
    memory_gb: float  # a GPU: weights, gradients, optimiser, layer inputs


def cost_of(work: Work, tokens: int, rows: int, shape: ModelShape, gpus: int, *, lora: bool) -> Cost:
    """One step's cost. rows: of the LM head. lora: the weights are frozen, which fits one GPU."""
    sizes = ModelSizes.of(shape)
    parameters = sum(weights_of_shape(shape))  # embeddings and LM head are two matrices
    products = 3 if lora else 4  # forward, again, for inputs (, for weights)
    head_products = 2 if lora else 3  # its logits are not made again
    microbatches = max(1, round(tokens / gpus / MICROBATCH_TOKENS))
    heads = 2 * sizes.queries + 2 * sizes.keys  # numbers of Q, K, V and the output of a layer, a token
    wide = 2 * (sizes.hidden + sizes.queries) + 2 * (sizes.hidden + sizes.keys)
    wide += 3 * (sizes.hidden + sizes.inner)  # inputs and outputs of a layer's matrices, a token
    linear_numbers = sizes.layers * (tokens * wide + microbatches * gpus * sizes.layer)
    head_numbers = rows * sizes.hidden + microbatches * gpus * sizes.head
    parts: list[tuple[float, float]] = [
        (2 * products * work.linear, BFLOAT16 * products * linear_numbers),
        (2 * work.attention * (1 + 1 + 2.5), BFLOAT16 * sizes.layers * tokens * heads * (1 + 1 + 2)),
        (2 * head_products * work.head, BFLOAT16 * head_products * head_numbers),
    ]
    trained = sizes.layer * sizes.layers * 2 * LORA_RANK / sizes.hidden if lora else parameters
    parts.append((0.0, 28 * trained))
    link = sharding_bytes(shape) * (gpus - 1) / gpus * microbatches
    compute = sum(max(o / PEAK_FLOP_PER_S, b / MEMORY_BYTES_PER_S) for o, b in parts) / gpus
    state = BFLOAT16 * parameters + 14 * trained  # fp32 master, two moments, bf16 gradient
    inputs = BFLOAT16 * sizes.layers * sizes.hidden * min(tokens, MICROBATCH_TOKENS)
    return Cost(
        tokens,
        1e-12 * sum(o for o, _ in parts),
        1e-9 * sum(b for _, b in parts),
        1e-9 * link,
        max(compute, link / LINK_BYTES_PER_S),
        1e-9 * (state / gpus + inputs),
    )


def plan() -> dict[str, tuple[Cost, Cost]]:
    """The cost of the flat batch and of the forest, for each set-up."""
    shape, forest = Qwen7B(), step_forest()
    found = {}
    for name, gpus, lora in (
        ("1 x H100, LoRA", 1, True),
        ("1 x H100", 1, False),
        ("8 x H100, FSDP", 8, False),
    ):
        costs = []
        for one in (unmerged(forest), forest):
            work, rows = work_of(whole(one), shape), int(predicting(one).sum())
            costs.append(cost_of(work, one.num_nodes, rows, shape, gpus, lora=lora))
        found[name] = (costs[0], costs[1])
    return found


def main() -> int:
    print("PREDICTED from formulas, not run: Qwen2.5-7B's shape, 16 groups of 8 agent trajectories, bf16.\n")
    heads = ("set-up", "batch", "tokens", "TFLOP", "GB", "GB over links, a GPU", "floor", "memory, a GPU")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, pair in plan().items():
        for batch, cost in zip(("flat", "forest"), pair, strict=True):
            fits = "" if cost.memory_gb <= MEMORY_GB else ", does not fit"
            print(
                f"| {name} | {batch} | {cost.tokens:,} | {cost.tera_operations:,.0f} | "
                f"{cost.giga_bytes:,.0f} | {cost.link_giga_bytes:,.0f} | {cost.floor_s:.2f} s | "
                f"{cost.memory_gb:.0f} GB{fits} |"
            )
    for name, (flat, forest) in plan().items():
        print(f"\n{name}: {flat.floor_s / forest.floor_s:.2f}x", end="")
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
