"""A checkpoint that does not load again is never called one, and it names what it was made with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from mosaic_fast.cli import run_cli
from mosaic_fast.errors import UserError
from mosaic_fast.learner import checkpoint as checkpoints
from mosaic_fast.learner.checkpoint import latest_checkpoint, made_with, versions
from mosaic_fast.policy import Policy
from mosaic_fast.policy.checkpoint import check_saved, weights_of
from tests.faults.conftest import run
from tests.policy.policy_helpers import tiny_model


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        change(values)
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def setting(**values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edit


_DAMAGE = {
    "a name lost": (weights(lambda w: w.pop("model.norm.weight")), r"lacks or adds model\.norm"),
    "a name too many": (weights(lambda w: w.update(x=torch.ones(1))), "lacks or adds x"),
    "an adapter's names": (
        weights(lambda w: w.update({"model.norm.base_layer.weight": w.pop("model.norm.weight")})),
        r"lacks or adds model\.norm",
    ),
    "one bit": (
        weights(lambda w: w["model.norm.weight"].view(torch.int32)[0].bitwise_xor_(1)),
        r"model\.norm\.weight with other values",
    ),
    "rounded": (
        weights(lambda w: w.update({"model.norm.weight": w["model.norm.weight"].bfloat16()})),
        r"model\.norm\.weight with other values",
    ),
    "another shape": (setting(hidden_size=30), "other values|cannot make its model"),
    "a head cut off": (setting(tie_word_embeddings=False), r"lacks or adds lm_head\.weight"),
    "a config of no sense": (setting(num_hidden_layers="two"), "cannot make its model"),
    "an adapter beside it": (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter"),
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_what_was_saved_is_looked_at_bit_for_bit(tmp_path: Path, damage: str):
    model = tiny_model("qwen3", torch.float32)
    Policy(model).save_pretrained(tmp_path)
    check_saved(tmp_path, weights_of(model))
    edit, said = _DAMAGE[damage]
    edit(tmp_path)
    with pytest.raises(UserError, match=said):
        check_saved(tmp_path, weights_of(model))


def test_the_first_checkpoint_is_opened_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Weights that are written under other names, as a model with an adapter put in by itself once was."""
    save = Policy.save_pretrained

    def wrongly(policy: Policy, path: Path) -> None:
        save(policy, path)
        weights(lambda w: w.update({"model.norm.base_layer.weight": w.pop("model.norm.weight")}))(path)

    monkeypatch.setattr(Policy, "save_pretrained", wrongly)
    assert run_cli(lambda: run(tmp_path / "run")) == 2
    assert "the checkpoint of step 1 cannot be loaded again, so it is not kept" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_tokenizer_that_loads_otherwise_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    save = PreTrainedTokenizerBase.save_pretrained

    def without_template(tokenizer: PreTrainedTokenizerBase, path: str, **options: object) -> None:
        save(tokenizer, path, **options)  # pyrefly: ignore [bad-argument-type]
        (Path(path) / "chat_template.jinja").unlink()

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", without_template)
    assert run_cli(lambda: run(tmp_path / "run")) == 2
    assert "the tokenizer loads with other chat template" in capsys.readouterr().err
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is None


def test_a_checkpoint_names_its_versions_and_other_ones_are_told(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    checkpoint = latest_checkpoint(finished / "checkpoints")
    assert checkpoint is not None
    named = made_with(checkpoint)
    assert named == versions()
    assert {"python", "torch", "transformers", "tokenizers", "mosaic-fast"} <= set(named)
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(checkpoints, "versions", lambda: named | {"torch": "9.9"})
    assert run(tmp_path / "run", "--resume") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"made with other versions, so that bits may differ: torch {named['torch']} -> 9.9" in said
