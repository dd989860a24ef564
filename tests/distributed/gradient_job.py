"""What every rank of a test job runs: updates on shards against the same updates in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mosaic_fast.config import ModelConfig
from mosaic_fast.distributed import ALONE, World, joined_world
from mosaic_fast.distributed.sharding import Sharding, whole
from mosaic_fast.learner.checkpoint import Progress, checkpoint_path, load_training_state, save_checkpoint
from mosaic_fast.learner.execution import Execution
from mosaic_fast.learner.learner import Learner, Reference
from mosaic_fast.learner.lora import Lora
from mosaic_fast.learner.step_batch import StepBatch
from mosaic_fast.policy import Policy
from mosaic_fast.policy.layout import checkpoint_activations
from tests.learner.flat_oracle import Case, forked_case
from tests.learner.learner_configs import config_of, moved
from tests.policy.policy_helpers import tiny_model

CPU = torch.device("cpu")
CASES = {  # name -> (family, loss, penalised, tokens at once, what is special)
    "qwen2 grpo": ("qwen2", "grpo", True, 24, ""),
    "qwen3 gspo": ("qwen3", "gspo", True, 16, ""),
    "gspo in one pass": ("qwen2", "gspo", False, 8192, ""),
    "phi3 dpo": ("phi3", "dpo", False, 16, ""),
    "llama dapo": ("llama", "dapo", False, 8192, ""),  # the group of ties is out of reach
    "checkpointing": ("qwen3", "grpo", True, 16, "checkpointing"),
    "lora": ("llama", "grpo", True, 16, "lora"),
    "one rollout": ("qwen2", "grpo", True, 24, "one"),  # the other ranks' shares are empty
    "ties": ("qwen2", "dapo", False, 24, "ties"),  # nothing is in reach of the loss
}


class Run:
    """A learner on a tiny model, in fp64 unless told otherwise, sharded over the world."""

    def __init__(self, name: str, world: World, dtype: torch.dtype = torch.float64) -> None:
        family, loss, penalised, budget, special = CASES[name]
        self.config = config_of(loss, penalised=penalised)
        self.world, self.case = world, forked_case()
        self.model = in_precision(tiny_model(family), dtype)
        self.policy, self.lora = Policy(self.model), None
        if special == "checkpointing":
            checkpoint_activations(self.model.train())
        if special == "lora":
            self.lora = Lora(self.model, ModelConfig(lora_rank=2), seed=3)
            in_precision(self.model, dtype)
            with torch.no_grad():
                for number, weight in enumerate(p for p in self.model.parameters() if p.requires_grad):
                    weight.copy_(torch.sin(torch.arange(weight.numel()) + number).view_as(weight) / 9)
        frozen = Policy(moved(in_precision(tiny_model(family), dtype)))
        self.sharding = Sharding(self.policy, world, CPU, master_weights=True)
        beside = Sharding(frozen, world, CPU)
        reference = Reference(frozen, beside.no_backward)
        if self.lora is not None:
            reference = Reference(self.policy, self.lora.off)
        self.learner = Learner(self.policy, reference, self.config, None, world, self.sharding)
        self.learner._execution = Execution(
            budget, self.config.rollout.temperature, self.model.config,
            world=world, before_pass=self.sharding.scatter_gradients,
        )  # fmt: skip
        self.gradients: dict[str, Tensor] = {}
        self.learner.optimizer.adamw.register_step_pre_hook(self._record)
        self.batch = batch_of(special)

    def _record(self, *_: object) -> None:
        optimizer = self.learner.optimizer
        self.gradients = {
            name: whole(torch.zeros_like(target) if target.grad is None else target.grad.clone(), weight)
            for name, weight, target in zip(
                optimizer._names, optimizer.weights, optimizer._targets, strict=True
            )
        }

    def weights(self) -> dict[str, Tensor]:
        with self.sharding.gathered():
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def save(self, folder: Path, progress: Progress) -> Path:
        def save_weights(into: Path | None) -> None:
            with self.sharding.gathered():
                if into is not None:
                    self.policy.save_pretrained(into)

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
        return save_checkpoint(
            folder, save_weights, tokenizer, self.learner.optimizer, progress, 9, self.world
        )


def in_precision(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    module: torch.nn.Module = model
    module.to(dtype)
    return model


def batch_of(special: str) -> StepBatch:
    case = forked_case()
    if special == "ties":
        case = replace(case, advantages=np.zeros_like(case.advantages))
    if special == "one":
        case = Case(
            case.sequences[:1], case.trained[:1], [-1], [0], [[0]], [np.full((1, 1), 0.5)],
            case.advantages[:1], case.returns[:1], case.rollout_logprobs[:1],
        )  # fmt: skip
    return case.batch()


class Scatters(TorchDispatchMode):
    """Counts the collectives that spread gradients over the ranks."""

    count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of the tensor and 1."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name] - theirs[name]).abs().max() / max(1.0, float(theirs[name].abs().max())))
        for name in theirs
    )


def compare(name: str, world: World) -> dict[str, float]:
    """An update of two epochs, sharded and alone: gradient of the second, weights after it, metrics."""
    sharded = Run(name, world)
    with Scatters() as scatters:
        figures = sharded.learner.update(sharded.batch, 0)
    weights = sharded.weights()
    alone = Run(name, ALONE)
    expected = alone.learner.update(alone.batch, 0)
    own = {"tree/", "time/", "scale/"}  # how it was run
    differ = [
        abs(figures[key] - value) / max(1.0, abs(value))
        for key, value in expected.items()
        if not any(key.startswith(prefix) for prefix in own)
    ]
    return {
        "gradient": furthest(sharded.gradients, alone.gradients),
        "weights": furthest(weights, alone.weights()),
        "metrics": max(differ),
        "size": max(float(g.abs().max()) for g in alone.gradients.values()),
        "balance": figures.get("scale/balance", 0.0),
        "microbatches": figures["tree/microbatches"],
        "one_pass": figures.get("tree/one_pass_frac", -1.0),
        "scatters": float(scatters.count),
    }


def round_trip(folder: Path, world: World, loaded: Path | None) -> dict[str, float]:
    """Save on these ranks, and load there and alone; also what other ranks have saved."""
    found: dict[str, float] = {}
    for kind, dtype in (("float64", torch.float64), ("bfloat16", torch.bfloat16)):
        run = Run("qwen2 grpo", world, dtype)
        run.learner.update(run.batch, 0)
        checkpoint = run.save(folder / kind, Progress(step=1))
        run.learner.update(run.batch, 1)
        beside = Run("qwen2 grpo", world, dtype)
        restore(beside, checkpoint)
        beside.learner.update(beside.batch, 1)
        found[f"{kind} resumed"] = furthest(beside.weights(), run.weights())
        if world.is_first:
            alone = Run("qwen2 grpo", ALONE, dtype)
            restore(alone, checkpoint)
            alone.save(folder / f"{kind}-alone", Progress(step=1))
        if loaded is not None:
            other = Run("qwen2 grpo", world, dtype)
            restore(other, checkpoint_path(loaded / kind, Progress(step=1)))
            other.save(folder / f"{kind}-again", Progress(step=1))
    return found


def restore(run: Run, checkpoint: Path) -> None:
    """The weights of a checkpoint's model folder, and its training state."""
    from safetensors.torch import load_file

    state = load_file(checkpoint / "model.safetensors")
    from mosaic_fast.distributed.sharding import local_part, local_rows

    for name, weight in run.model.named_parameters():
        start, stop = local_rows(weight)
        local_part(weight).copy_(state[name][start:stop])
    load_training_state(checkpoint, run.learner.optimizer)


def main(folder: Path, loaded: Path | None) -> None:
    """Write FOLDER/found.json and checkpoints. loaded: other ranks' folder, loaded and written again."""
    torch.set_num_threads(1)
    with joined_world() as world:
        found = {name: compare(name, world) for name in CASES}
        found["checkpoint"] = round_trip(folder, world, loaded)
        if world.is_first:
            (folder / "found.json").write_text(json.dumps(found))
