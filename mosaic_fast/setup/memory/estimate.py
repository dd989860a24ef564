"""The components of a run's memory on the device of the policy, each at its peak.

Upper limits where the data decides: every token of a micro-batch trained, every rollout as long as it may be.
Not counted: PyTorch's own context, fragmentation of its allocator, and index arrays.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mosaic_fast.config import Config
from mosaic_fast.learner.execution.cost import FLOAT32
from mosaic_fast.policy.shape import Shape
from mosaic_fast.setup.memory.layer import layer_memory, shape_of
from mosaic_fast.setup.model_folder import device_of, model_folder
from mosaic_kernels.forest.ideal import ModelSizes
from mosaic_kernels.logprob.chunked import memory_plan

GPU_CHUNK_LOGITS = 2**27  # mosaic_kernels.logprob.triton's, which cannot be imported without Triton
PHASES = ("update", "rollouts", "checkpoint")
SPARE_FRAC = 0.1
"""Share of a device that an estimate should leave: context, fragmentation, indices."""
USUAL_TOKENS, MOST_TOKENS = 8192, 65_536  # of a micro-batch: on a CPU, and beyond which nothing is gained


@dataclass(frozen=True)
class Component:
    """Bytes of one part, and the phases of a step in which it is there."""

    name: str
    bytes: int
    phases: tuple[str, ...] = PHASES
    about: str = ""
    counted: bool = True  # False: shown beside the total


@dataclass(frozen=True)
class Estimate:
    """All parts on the policy's device, and what is shown beside them."""

    parameters: int
    trained: int
    device: str  # cpu or cuda
    tokens: int  # of the largest micro-batch
    components: tuple[Component, ...]

    def total(self, phase: str) -> int:
        """Bytes of all counted parts that are there in a phase."""
        return sum(part.bytes for part in self.components if part.counted and phase in part.phases)

    @property
    def peak(self) -> int:
        return max(map(self.total, PHASES))


def estimate_memory(config: Config) -> Estimate:
    """Estimate a run's memory from its model's config.json. UserError where that is missing or refused."""
    model = shape_of(model_folder(config.model.path, weights=False), config)
    return _estimate(config, model, min(_microbatch_tokens(config, model), _step_tokens(config)))


def microbatch_tokens(config: Config) -> int:
    """Tokens of a micro-batch: as configured; for 0, what the memory of the policy's device has room for."""
    configured = config.forest.tokens_per_microbatch
    return configured or _microbatch_tokens(
        config, shape_of(model_folder(config.model.path, weights=False), config)
    )


def device_memory(device: str) -> tuple[str, int] | None:
    """Name and size of the device's memory; None for a GPU that is not here."""
    if device == "cpu":
        return "this machine's memory", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]


def _microbatch_tokens(config: Config, model: PreTrainedModel) -> int:
    """A multiple of 1,024 whose update leaves SPARE_FRAC of a GPU free, at least the longest rollout."""
    configured, least = config.forest.tokens_per_microbatch, config.rollout.max_rollout_tokens
    found = device_memory("cuda") if _device(config) == "cuda" else None
    if configured or found is None:
        return configured or max(USUAL_TOKENS, least)
    room = found[1] * (1 - SPARE_FRAC)
    low, high = 0, min(MOST_TOKENS, _step_tokens(config)) // 1024 + 1  # in 1,024 tokens: fits, does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = _estimate(config, model, 1024 * middle).total("update") <= room
        low, high = (middle, high) if fits else (low, middle)
    return max(1024 * low, least)


def _device(config: Config) -> str:
    return "cuda" if config.model.device == "cuda" else device_of(config).type


def _step_tokens(config: Config) -> int:
    rollout = config.rollout
    return rollout.prompts_per_step * rollout.group_size * rollout.max_rollout_tokens


def _estimate(config: Config, model: PreTrainedModel, tokens: int) -> Estimate:
    """The estimate with micro-batches of a size."""
    device = _device(config)
    cut = _step_tokens(config) > tokens
    parts = [
        *_weights(config, model),
        *_update(config, model, tokens, on_cpu=device == "cpu", cut=cut),
        *_engine(config, model),
    ]
    return Estimate(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in _trained(model)),
        device,
        tokens,
        tuple(part for part in parts if part.bytes),
    )


def _weights(config: Config, model: PreTrainedModel) -> list[Component]:
    """The parts that are there from the start of a run to its end, and those of weights in some phase."""
    trained = _trained(model)
    masters = [p for p in trained if _has_master(p, config)]
    own = [p for p in trained if not _has_master(p, config)]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    copies = FLOAT32 * _numel(masters)
    averages = 2 * (FLOAT32 * _numel(masters) + _bytes(own))
    reference = config.loss.needs_reference and not config.model.lora_rank
    adapters = [*trained] if config.model.lora_rank else []
    base = frozen if config.model.lora_rank else [*model.parameters()]
    return [
        Component("weights", _bytes(base), about=config.model.dtype),
        Component("adapters", _bytes(adapters), about=f"LoRA, rank {config.model.lora_rank}"),
        Component("fp32 master weights", copies, about="optim.master_weights"),
        Component("AdamW's averages", averages, about="two numbers a trained weight"),
        Component(
            "reference policy", _bytes(base) if reference else 0, about="loss.kl_weight, pairwise losses"
        ),
        Component("gradients", copies + _bytes(own), ("update",), "of the trained weights"),
        Component(
            "merged weights", _bytes(base) if adapters else 0, ("checkpoint",), "adapter added, to be written"
        ),
    ]


def _update(
    config: Config, model: PreTrainedModel, tokens: int, *, on_cpu: bool, cut: bool
) -> list[Component]:
    """What a forward and backward pass over a full micro-batch adds, at its peak."""
    layer = layer_memory(model, tokens, on_cpu=on_cpu, checkpointed=config.model.activation_checkpointing)
    head, head_about = _head(config, model, tokens, on_cpu=on_cpu)
    embedding = _matrix(model.get_input_embeddings())
    matrix = _bytes([embedding]) if embedding.requires_grad else 0
    tied = matrix if model.config.tie_word_embeddings else 0  # the head's gradient waits for the embedding's
    about = "kept for the backward pass"
    if config.model.activation_checkpointing:
        about = "checkpointed: inputs of layers, and one layer"
    after_layers = 2 * matrix + (FLOAT32 * embedding.numel() if _has_master(embedding, config) else 0)
    working = max(layer.norm + head, tied + layer.backward, after_layers - layer.kept)
    key_values = _key_value_numbers(model)
    copies = 2 if config.model.activation_checkpointing else 1  # else the keys are activations already
    held = tokens * key_values * (copies * model.dtype.itemsize + FLOAT32) if cut else 0
    return [
        Component(f"activations, {tokens:,} tokens", layer.kept, ("update",), about),
        Component("LM head and working space", working, ("update",), head_about),
        Component("held prefixes", held, ("update",), "at most: keys, values, their gradients"),
    ]


def _head(config: Config, model: PreTrainedModel, tokens: int, *, on_cpu: bool) -> tuple[int, str]:
    """Bytes of the LM head's forward and backward pass, of a model whose head is a matrix."""
    weight = _matrix(model.get_output_embeddings())
    vocab, width = weight.shape
    rows, size = tokens * width, model.dtype.itemsize
    gradient = _bytes([weight]) if weight.requires_grad else 0
    if on_cpu:
        most, may_keep = memory_plan(tokens, vocab, FLOAT32)
        chunk = vocab * min(tokens, most)
        all_kept = tokens * vocab <= may_keep
        kept = tokens * vocab if all_kept else may_keep // chunk * chunk
        logits = FLOAT32 * (
            kept + (1 if all_kept else 2) * chunk
        )  # probabilities that are not kept have a place
        casts = (FLOAT32 * (rows + weight.numel()) if size < FLOAT32 else 0) + (
            FLOAT32 - size
        ) * gradient // size
        return FLOAT32 * rows + logits + gradient + casts, f"{logits / 2**20:,.0f} MiB of logits"
    logits = size * min(GPU_CHUNK_LOGITS, tokens * vocab)
    waits = FLOAT32 * weight.numel() if gradient and _has_master(weight, config) else 0
    return 2 * FLOAT32 * rows + logits + gradient + waits, f"{logits / 2**20:,.0f} MiB of logits"


def _engine(config: Config, model: PreTrainedModel) -> list[Component]:
    """The engine's part: on the policy's device, or beside it where servers have GPUs of their own."""
    rollout, engine, phase = config.rollout, config.engine, ("rollouts",)
    rows = min(engine.max_batch, rollout.prompts_per_step * rollout.group_size)
    longest = min(rollout.max_rollout_tokens, model.config.max_position_embeddings)
    a_token = _key_value_numbers(model) * model.dtype.itemsize
    if engine.kind == "local":
        possible = rollout.prompts_per_step * rollout.group_size * longest
        cached = 2 * a_token * min(engine.max_cached_tokens, possible)
        decoded = 3 * a_token * rows * longest // 2
        logits = 3 * FLOAT32 * rows * model.config.vocab_size
        return [
            Component("prefix cache", cached, phase, "engine.max_cached_tokens, doubled as it grows"),
            Component("keys and values of rows", decoded, phase, f"{rows} rows, which grow by half"),
            Component("logits to sample from", logits, phase, f"{rows} rows"),
        ]
    weights = _bytes([p for name, p in model.named_parameters() if "lora_" not in name])
    where = "its own copy" if engine.colocated else "on its own GPU"
    return [
        Component("SGLang: weights", weights, phase, where, counted=engine.colocated),
        Component(
            "SGLang: keys and values",
            a_token * rows * longest,
            phase,
            f"{rows} whole rollouts; --mem-fraction-static says what it takes",
            counted=False,
        ),
    ]


def _matrix(module: nn.Module | None) -> Tensor:
    weight = getattr(module, "weight", None)
    assert isinstance(weight, Tensor)
    return weight


def _trained(model: PreTrainedModel) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _has_master(weight: Tensor, config: Config) -> bool:
    return weight.requires_grad and weight.dtype == torch.bfloat16 and config.optim.master_weights


def _key_value_numbers(model: PreTrainedModel) -> int:
    """Numbers in a token's keys and values of all layers."""
    sizes = ModelSizes.of(Shape.of(model.config))
    return 2 * sizes.keys * sizes.layers


def _numel(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
