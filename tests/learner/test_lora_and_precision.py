"""LoRA, bfloat16 with fp32 master weights, activation checkpointing: in the learner and as a run."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mosaic_fast.config import ModelConfig, OptimConfig
from mosaic_fast.errors import TrainingError, UserError
from mosaic_fast.learner.checkpoint import latest_checkpoint
from mosaic_fast.learner.learner import Learner, Reference
from mosaic_fast.learner.lora import Lora
from mosaic_fast.learner.optimizer import Optimizer
from mosaic_fast.learner.tensor_file import reading, write_tensors
from mosaic_fast.policy import Policy
from mosaic_fast.setup.engine import _PolicyWeights
from mosaic_kernels import pack_forest
from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.types import Request, SamplingParams
from tests.learner.flat_oracle import alone, flat_loss, forked_case
from tests.learner.learner_configs import config_of
from tests.policy.policy_helpers import assert_gradients_close, example_rollouts, tiny_model
from tests.run.test_run import assert_same_run, run

FAMILIES = ("qwen2", "qwen3", "phi3", "llama")


def with_adapter(family: str) -> tuple[PreTrainedModel, Lora]:
    """A fp64 model whose adapter is not zero."""
    model = tiny_model(family)
    lora = Lora(model, ModelConfig(lora_rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, lora


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_a_lora_update_is_the_flat_batchs_and_its_reference_the_base(family: str, name: str):
    """The oracle's reference is a second model that never had an adapter."""
    case, config = forked_case(), config_of(name)
    model, lora = with_adapter(family)
    for module in model.modules():
        module.to(torch.float64)
    learner = Learner(Policy(model), Reference(Policy(model), lora.off), config)
    seen: dict[str, torch.Tensor] = {}

    def record(*_: object) -> None:
        if not seen:
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    handle = learner.optimizer.adamw.register_step_pre_hook(record)
    fresh, _ = with_adapter(family)
    learner.update(case.batch(), 0)
    handle.remove()

    with torch.no_grad():
        start, _ = alone(fresh, case, 0.7)
        reference, _ = alone(tiny_model(family), case, 0.7)
    policy, entropies = alone(fresh, case, 0.7)
    flat_loss(case, config, policy, entropies, start, reference).backward()
    expected = {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None}
    assert seen.keys() == expected.keys()
    assert all("lora_" in n for n in seen)
    assert_gradients_close(seen, expected, 1e-10)


def test_the_merged_folder_loads_without_peft_and_the_adapter_with_it(tmp_path: Path):
    from peft import PeftModel

    model, lora = with_adapter("qwen3")
    model.float()
    forest = example_rollouts().pack()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = Policy(model).logprobs(forest)
    lora.save(tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(Policy(merged).logprobs(forest), own, rtol=0, atol=2e-5)
    base = tiny_model("qwen3", torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").get_base_model()
    assert isinstance(adapted, PreTrainedModel)
    torch.testing.assert_close(Policy(adapted).logprobs(forest), own, rtol=0, atol=2e-5)
    with lora.off():
        without = Policy(model).logprobs(forest)
    bare = Policy(tiny_model("qwen3", torch.float32)).logprobs(forest)
    torch.testing.assert_close(without, bare, rtol=0, atol=2e-5)
    assert (without - own).abs().max() > 0.1  # the adapter does something


def test_targets_that_do_not_exist_are_named():
    config = ModelConfig(lora_rank=2, lora_targets=("q_proj", "wq"))
    with pytest.raises(UserError, match=r"lora_targets: wq names no linear module.*there are .*q_proj"):
        Lora(tiny_model("qwen2"), config, seed=0)


def test_an_adapter_is_drawn_from_its_seed_alone():
    """Whatever was drawn before; a resumed or repeated run begins with the same adapter."""
    drawn = []
    for seed, before in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(before)
        model = tiny_model("qwen2")
        torch.rand(before)
        Lora(model, ModelConfig(lora_rank=2), seed)
        drawn.append(torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_an_update_is_adamws_on_the_clipped_gradient():
    """The formula, with every setting (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""
    config = OptimConfig(lr=0.1, beta1=0.7, beta2=0.9, weight_decay=0.2, grad_clip=2.0)
    model = torch.nn.Linear(2, 1, bias=False).double()
    optimizer = Optimizer(model, config)
    weight = model.weight.detach().clone()
    average, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, (gradient, norm) in enumerate((([3.0, 4.0], 5.0), ([0.6, -0.8], 1.0), ([-6.0, 8.0], 10.0)), 1):
        given = torch.tensor([gradient], dtype=torch.float64)
        model.weight.grad = given.clone()
        assert optimizer.step(0.1 / step, step) == pytest.approx(norm)
        given = given * min(1.0, 2.0 / norm)
        average = 0.7 * average + 0.3 * given
        square = 0.9 * square + 0.1 * given**2
        moved = (average / (1 - 0.7**step)) / ((square / (1 - 0.9**step)).sqrt() + 1e-8)
        weight = weight - 0.1 / step * (moved + 0.2 * weight)
        torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("adapters", [False, True])
def test_weight_decay_spares_norms_biases_and_embeddings(family: str, adapters: bool):
    """With a gradient of zero AdamW does nothing but decay."""
    model = tiny_model(family)
    if adapters:
        Lora(model, ModelConfig(lora_rank=2), seed=0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    Optimizer(model, OptimConfig(weight_decay=0.5)).step(0.1, 1)
    decayed = {
        name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])
    }
    expected = {name for name in before if not any(part in name for part in ("norm", "bias", "embed_tokens"))}
    assert decayed == expected
    assert decayed
    assert all(("lora_" in name) == adapters for name in decayed)
    for name, weight in model.named_parameters():
        if name in decayed:
            torch.testing.assert_close(weight.detach(), before[name] * (1 - 0.1 * 0.5))


def test_an_optimiser_with_weight_decay_resumes_to_the_bit(tmp_path: Path):
    """AdamW numbers its weights by group, a checkpoint by name."""
    config = OptimConfig(weight_decay=0.1, lr=0.01)
    models = [tiny_model("qwen2") for _ in range(2)]
    optimizers = [Optimizer(model, config) for model in models]

    def update(model: torch.nn.Module, optimizer: Optimizer, step: int) -> None:
        for number, weight in enumerate(model.parameters(), 1):
            weight.grad = torch.full_like(weight, 0.01 * step * number)
        optimizer.step(0.01, step)

    for step in (1, 2):
        update(models[0], optimizers[0], step)
    write_tensors(tmp_path / "state", optimizers[0].entries())
    models[1].load_state_dict(models[0].state_dict())
    with reading(tmp_path / "state") as read:
        optimizers[1].load(read, 2)
    for model, optimizer in zip(models, optimizers, strict=True):
        update(model, optimizer, 3)
    for ours, others in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, others)


def test_master_weights_keep_what_bfloat16_would_round_away():
    """1,000 updates of a ten-thousandth each: bf16 alone stays where it is."""
    moved = {}
    for keep in (True, False):
        model = torch.nn.Linear(4, 4, bias=False).bfloat16()
        with torch.no_grad():
            model.weight.fill_(1.0)
        optimizer = Optimizer(model, OptimConfig(lr=1e-4, master_weights=keep))
        for step in range(1000):
            model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
            optimizer.step(1e-4, step)
        moved[keep] = float(1.0 - model.weight.detach().float().mean())
    assert moved[True] == pytest.approx(0.1, rel=0.05)
    assert moved[False] == 0.0


def test_micro_batch_gradients_add_up_in_fp32():
    """256 gradients of 1 after one of 256: in bfloat16 the sum would stay at 256."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = Optimizer(model, OptimConfig(grad_clip=1e9))
    for scale in (256.0, *[1.0] * 256):
        (model(torch.ones(1, 1, dtype=torch.bfloat16)) * scale).sum().backward()
    assert optimizer.step(1e-3, 0) == pytest.approx(512.0)


def test_a_state_of_other_precision_is_refused(tmp_path: Path):
    half, whole = torch.nn.Linear(2, 2).bfloat16(), torch.nn.Linear(2, 2)
    write_tensors(tmp_path / "state", Optimizer(half, OptimConfig()).entries())
    with (
        reading(tmp_path / "state") as read,
        pytest.raises(TrainingError, match=r"\(master\.bias\): model\.dtype"),
    ):
        Optimizer(whole, OptimConfig()).load(read, 0)


EMBEDDED = ["--model.path", "embedded", "--rollout.prompts-per-step", "4"]  # an untrained model ties always
VARIANTS = {
    "bfloat16": ["--model.dtype", "bfloat16", "--model.activation-checkpointing", "--loss.name", "gspo"],
    "lora": ["--model.lora-rank", "4", "--optim.lr", "0.01", "--loss.name", "dpo"],
    "subtree": ["--forest.credit", "subtree", "--rollout.branching", "fork_at_check"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_runs_and_resumes_bitwise(options: list[str], tmp_path: Path, variant: str):
    """Two steps at once, and the second one again from a copy that has only the first checkpoint."""
    chosen = [*options, *VARIANTS[variant], "--env.eval-tasks", "0", "--steps", "2", *EMBEDDED]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert run(chosen, whole) == 0
    shutil.copytree(whole, halved)
    shutil.rmtree(halved / "checkpoints" / "step-000002")
    assert run(chosen, halved, "--resume") == 0
    assert_same_run(whole, halved, steps=2)
    checkpoint = latest_checkpoint(whole / "checkpoints")
    assert checkpoint is not None
    assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() > 0
    assert (checkpoint / "adapter").is_dir() == variant.startswith("lora")
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(row["optim/grad_norm"] > 0 for row in rows)
    assert all(row["mismatch/kl"] < 1e-3 for row in rows)  # the engine samples with the adapter, and in bf16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "lm_head"), ("lm_head",)])
def test_what_was_trained_is_served_and_saved_or_the_target_refused(
    family: str, targets: tuple[str, ...], tmp_path: Path
):
    """The log-probs that the engine samples with, and those of the saved folder, are the trained policy's."""
    model = tiny_model(family, torch.float32)
    config = ModelConfig(lora_rank=2, lora_targets=targets if family != "phi3" else _of_phi3(targets))
    if "lm_head" in targets and model.config.tie_word_embeddings:
        with pytest.raises(UserError, match=r"lora_targets: the LM head .* is its embedding"):
            Lora(model, config, seed=0)
        return
    lora = Lora(model, config, seed=0)
    policy, forest = Policy(model), example_rollouts().pack()
    before = policy.logprobs(forest).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):  # B is 0 before the first step, so A has no gradient
        policy.logprobs(forest).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = policy.logprobs(forest).detach()
    assert (trained - before).abs().max() > 1e-3

    engine = LocalEngine(model)
    prompt = np.array([1, 2, 3])
    request = Request(prompt, SamplingParams(6, 1.0, ()), seed=0, rollout_key=0)
    (completion,) = asyncio.run(engine.generate([request]))
    tokens = np.concatenate([prompt, completion.token_ids])
    own = policy.logprobs(pack_forest([tokens])).detach()[len(prompt) :]
    torch.testing.assert_close(torch.from_numpy(completion.logprobs), own, rtol=0, atol=2e-5)

    lora.save(tmp_path, check=True)
    saved = Policy.from_pretrained(tmp_path)
    torch.testing.assert_close(saved.logprobs(forest), trained, rtol=0, atol=2e-5)
    served = dict(_PolicyWeights(policy, lora).named_tensors())
    for name, parameter in saved.model.named_parameters():
        assert torch.equal(served[name], parameter), name


def _of_phi3(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Phi-3 has one projection for queries, keys and values."""
    return tuple("qkv_proj" if name == "q_proj" else name for name in targets)
