"""TRL's trainers give the same with shared prefixes as without: log-probs, losses, gradients, curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from examples import share_in_trainer, share_in_trl
from mosaic_fast.errors import UserError
from mosaic_fast.integrations import trl as integration
from mosaic_fast.integrations.rows import IGNORED
from mosaic_fast.integrations.trl import share_prefixes
from mosaic_fast.policy.checkpoint import save_model
from tests.integrations.trainers import (
    DoubleHead,
    first_batch,
    in_double,
    loss_and_gradients,
    make,
    tokenizer,
)
from tests.policy.policy_helpers import assert_gradients_close, tiny_model

EXAMPLES = Path(share_in_trl.__file__).parent
LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"loss_type": "dapo"}),
    ("grpo", {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2}),
    ("grpo", {"loss_type": "dr_grpo", "importance_sampling_level": "sequence"}),
    ("grpo", {"loss_type": "cispo", "entropy_coef": 0.01}),
    ("grpo", {"loss_type": "sapo", "top_entropy_quantile": 0.5}),
    ("grpo", {"loss_type": "bnpo", "mask_truncated_completions": True, "max_completion_length": 16}),
    ("rloo", {"beta": 0.05}),
    ("rloo", {"beta": 0.0, "num_iterations": 2}),
    ("dpo", {"loss_type": ["sigmoid"]}),
    ("dpo", {"loss_type": ["ipo"], "f_divergence_type": "js_divergence"}),
    ("dpo", {"loss_type": ["hinge", "sft"], "loss_weights": [0.7, 0.3], "ld_alpha": 0.5}),
    ("dpo", {"loss_type": ["apo_zero"], "use_weighting": True}),
    ("dpo", {"loss_type": ["sigmoid"], "precompute_ref_log_probs": True}),
    ("kto", {"loss_type": "kto"}),
    ("kto", {"loss_type": "apo_zero_unpaired"}),
    ("sft", {}),
    ("sft", {"loss_type": "dft"}),
    ("sft", {"completion_only_loss": False}),
    ("sft", {"padding_free": True, "max_length": None}),
]
ONE_EACH = [("grpo", {"beta": 0.1}), ("rloo", {"beta": 0.1}), ("dpo", {}), ("kto", {}), ("sft", {})]


def name_of(value: object) -> str:
    return (
        value
        if isinstance(value, str)
        else "-".join(map(str, value.values()))
        if isinstance(value, dict)
        else ""
    )


def assert_same(trainer: Any, tolerance: float, *, batches: int = 1) -> None:
    """The loss and every gradient of a batch, before and after `share_prefixes`, which must have shared."""
    batch = first_batch(trainer)
    expected = loss_and_gradients(trainer, batch)
    sharing = share_prefixes(trainer)
    found = loss_and_gradients(trainer, batch)
    assert sharing.forwards >= batches
    assert sharing.computed_tokens < sharing.row_tokens
    assert not sharing.left_to_trl
    assert set(found) == set(expected)
    assert len(found) > 3
    loss, right = float(found.pop("loss")), float(expected.pop("loss"))
    assert abs(loss - right) <= tolerance * max(1.0, abs(right))  # terms of either sign may cancel
    assert_gradients_close(found, expected, tolerance)


@pytest.mark.parametrize(("kind", "settings"), LOSSES, ids=name_of)
def test_a_loss_and_its_gradients_are_the_same(kind: str, settings: dict[str, Any], tmp_path: Path):
    assert_same(make(kind, tmp_path, **settings), 2e-5)


@pytest.mark.parametrize(("kind", "settings"), LOSSES, ids=name_of)
def test_with_the_head_in_fp64_they_are_the_same_to_1e_10(
    kind: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", DoubleHead)
    trainer = make(kind, tmp_path, tiny_model("qwen3"), **settings)
    in_double(trainer.model)
    if getattr(trainer, "ref_model", None) is not None:
        in_double(trainer.ref_model.double())
    assert_same(trainer, 1e-10)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dpo", "kto", "sft"])
def test_with_an_adapter_whose_reference_is_the_model_without_it(kind: str, tmp_path: Path):
    settings: dict[str, Any] = {"beta": 0.1} if kind != "sft" else {}
    trainer = make(kind, tmp_path, lora=True, **settings)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    assert_same(trainer, 2e-5)


@pytest.mark.parametrize("family", ["qwen2-window", "qwen3-window", "phi3", "llama-bias", "longrope"])
def test_other_families(family: str, tmp_path: Path):
    assert_same(make("dpo", tmp_path, tiny_model(family, torch.float32)), 5e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant: bool, tmp_path: Path):
    assert_same(
        make(
            "dpo",
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        ),
        2e-5,
    )


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_in_mixed_precision_the_error_is_that_of_trl(kind: str, tmp_path: Path):
    """Under autocast to bf16, against the same loss in fp32: at most 3 times TRL's own error, and a floor."""
    exact = make(kind, tmp_path, beta=0.1)
    batch = first_batch(exact)
    expected = loss_and_gradients(exact, batch)
    trainer = make(kind, tmp_path, tiny_model("qwen3", torch.float32), beta=0.1, bf16=True)
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        of_trl = loss_and_gradients(trainer, batch)
        sharing = share_prefixes(trainer)
        found = loss_and_gradients(trainer, batch)
    assert sharing.forwards
    for name, right in expected.items():
        scale = max(float(right.norm()), 1e-3)
        error, plain = (
            float((found[name] - right).norm()) / scale,
            float((of_trl[name] - right).norm()) / scale,
        )
        assert error <= 3 * plain + 8e-3, f"{name}: {error:.1e}, TRL alone {plain:.1e}"


@pytest.mark.parametrize(("kind", "settings"), ONE_EACH, ids=name_of)
@pytest.mark.parametrize("lora", [False, True])
def test_twenty_steps_have_the_same_curve(kind: str, settings: dict[str, Any], lora: bool, tmp_path: Path):
    curves = []
    for shared in (False, True):
        trainer = make(kind, tmp_path, lora=lora, max_steps=20, **settings)
        sharing = share_prefixes(trainer) if shared else None
        trainer.train()
        if sharing is not None:
            assert sharing.forwards >= 20
            assert not sharing.left_to_trl
        rows = [row for row in trainer.state.log_history if "loss" in row]
        assert len(rows) == 20
        curves.append(rows)
    for alone, ours in zip(*curves, strict=True):
        strange = set(alone) ^ set(ours)
        assert not strange
        for name, value in alone.items():
            if "time" not in name and "runtime" not in name and "per_second" not in name:
                assert ours[name] == pytest.approx(value, rel=2e-3, abs=2e-4), f"step {alone['step']}: {name}"


def test_every_output_is_the_same_in_every_place(tmp_path: Path):
    """All five fields, for rows with padding on both sides, of which one is a row of its own."""
    trainer = make("dpo", tmp_path, use_weighting=True)
    ids = torch.tensor([[0, 5, 6, 7, 8, 9], [5, 6, 7, 4, 0, 0], [5, 6, 7, 4, 3, 0], [9, 9, 9, 9, 9, 9]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, :2] = labels[3, 3] = IGNORED
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True}
    model = trainer.model
    for scored in (None, torch.tensor(7.0)):
        model.forward = forward_of_trl(model)
        expected = model(**batch, num_items_in_batch=scored)
        vars(trainer).pop("mosaic_sharing", None)
        sharing = share_prefixes(trainer)
        found = model(**batch, num_items_in_batch=scored)
        assert sharing.computed_tokens == 5 + 2 + 6
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_rotary_frequencies_are_those_of_the_padded_batch(tmp_path: Path):
    """longrope changes them by the longest row, padding included: a short row beside a long one sees its."""
    trainer = make("sft", tmp_path, tiny_model("longrope", torch.float32))
    ids = torch.tensor([[5, 6, 7, 8, 0, 0, 0, 0], [5, 6, 7, 9, 4, 3, 8, 7]])
    mask = (ids != 0).long()
    for width in (4, 8):
        batch = {"input_ids": ids[:, :width], "attention_mask": mask[:, :width]}
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        trainer.model.forward = forward_of_trl(trainer.model)
        expected = trainer.model(**batch, fused_lm_head=True).log_probs
        vars(trainer).pop("mosaic_sharing", None)
        share_prefixes(trainer)
        found = trainer.model(**batch, fused_lm_head=True).log_probs
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def forward_of_trl(model: Any) -> Any:
    """TRL's own forward again."""
    forward = model.forward
    cells = dict(zip(forward.__func__.__code__.co_freevars, forward.__func__.__closure__ or (), strict=True))
    return cells["before"].cell_contents if "before" in cells else forward


def test_what_is_no_forest_is_left_to_trl_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer = make("sft", tmp_path)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    holes = {"attention_mask": torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])}
    embedded = {"inputs_embeds": trainer.model.get_input_embeddings()(ids).detach()}
    for strange in (holes, embedded):
        batch = {**strange, "labels": ids.masked_fill(torch.tensor([1, 1, 1, 0]) == 1, IGNORED)}
        if "inputs_embeds" not in strange:
            batch["input_ids"] = ids
        trainer.model.forward = forward_of_trl(trainer.model)
        expected = trainer.model(**batch, fused_lm_head=True)
        vars(trainer).pop("mosaic_sharing", None)
        caplog.clear()
        sharing = share_prefixes(trainer)
        for _ in range(2):
            found = trainer.model(**batch, fused_lm_head=True)
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=0)
        assert len([line for line in caplog.messages if "left to TRL" in line]) == 1
        assert list(sharing.left_to_trl.values()) == [2]


def test_nothing_scored_is_a_differentiable_zero(tmp_path: Path):
    trainer = make("sft", tmp_path)
    share_prefixes(trainer)
    ids = torch.tensor([[5, 6], [5, 7]])
    found = trainer.model(input_ids=ids, labels=torch.full_like(ids, IGNORED), fused_lm_head=True)
    found.loss.backward()
    assert not found.log_probs.any()


def test_generation_and_plain_calls_are_the_models_own(tmp_path: Path):
    trainer = make("sft", tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    expected = trainer.model(input_ids=ids, labels=ids)
    share_prefixes(trainer)
    share_prefixes(trainer)  # changes nothing
    found = trainer.model(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, expected.logits)
    assert found.loss == expected.loss


def test_saved_and_loaded_again_the_model_is_an_ordinary_one(tmp_path: Path):
    trainer = make("sft", tmp_path, max_steps=1)
    share_prefixes(trainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name])


def test_siblings_meet(tmp_path: Path):
    """Where TRL scatters the rows of a prompt, or of a common beginning, fewer tokens are computed."""
    several: dict[str, Any] = {"steps_per_generation": 4}
    for kind, settings in (("grpo", several), ("sft", {}), ("dpo", {})):
        computed = []
        for siblings in (False, True):
            trainer = make(
                kind, tmp_path, max_steps=4, learning_rate=0.0, per_device_train_batch_size=4, **settings
            )
            sharing = share_prefixes(trainer, siblings=siblings)
            trainer.train()
            computed.append(sharing.computed_tokens / sharing.row_tokens)
        assert computed[1] < 0.9 * computed[0], kind


def test_siblings_are_refused_where_trl_orders_rows_itself(tmp_path: Path):
    with pytest.raises(UserError, match="train_sampling_strategy is 'sequential'"):
        share_prefixes(make("kto", tmp_path), siblings=True)


def test_what_every_batch_would_fail_by_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = make("dpo", tmp_path)
    trainer.model.config.attention_dropout = 0.1
    with pytest.raises(UserError, match=r"attention_dropout is 0\.1"):
        share_prefixes(trainer)
    trainer.model.config.attention_dropout = 0.0
    handle = trainer.model.get_decoder().register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="has hooks"):
        share_prefixes(trainer)
    handle.remove()
    for name in ("torch_compile", "use_liger_kernel"):
        monkeypatch.setattr(trainer.args, name, True)
        with pytest.raises(UserError, match=name):
            share_prefixes(trainer)
        monkeypatch.setattr(trainer.args, name, False)
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        monkeypatch.setattr(trainer, name, True)
        with pytest.raises(UserError, match=r"FSDP|DeepSpeed"):
            share_prefixes(trainer)
        monkeypatch.setattr(trainer, name, False)
    monkeypatch.setattr(integration, "version", lambda _: "1.17.2")
    with pytest.raises(UserError, match=r"TRL 1\.17\.2 is installed, and share_prefixes knows 1\.16"):
        share_prefixes(trainer)
    with pytest.raises(UserError, match="is for TRL's GRPOTrainer"):
        share_prefixes(object())  # pyrefly: ignore [bad-argument-type]


def test_the_examples_train_and_share(tmp_path: Path):
    """Each in a file of under 60 lines; the plain Trainer's losses are those of Trainer itself."""
    for file in ("share_in_trl.py", "share_in_trainer.py"):
        assert len((EXAMPLES / file).read_text(encoding="utf-8").splitlines()) < 60
    model = tiny_model("qwen3", torch.float32)
    words = tokenizer()
    save_model(model, tmp_path)
    words.save_pretrained(tmp_path)
    sharing = share_in_trl.main(str(tmp_path))
    assert sharing.forwards
    assert sharing.computed_tokens < 0.7 * sharing.row_tokens
    curves = [
        [row["loss"] for row in trainer.state.log_history if "loss" in row]
        for trainer in (share_in_trainer.main(str(tmp_path)), share_in_trainer.main(str(tmp_path), Trainer))
    ]
    assert len(curves[0]) == 2
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
