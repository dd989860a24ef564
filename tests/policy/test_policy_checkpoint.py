"""Loading and saving: stock transformers reads what we write; a user's mistake is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from mosaic_fast.errors import UserError
from mosaic_fast.policy import Policy
from tests.policy.policy_helpers import example_rollouts, tiny_model


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "phi3", "phi3-window", "llama-bias"])
def test_round_trip(case: str, tmp_path: Path) -> None:
    """Tied and untied heads; the same bits through our loader and through transformers' own."""
    model, forest = tiny_model(case, torch.float32), example_rollouts().pack()
    policy = Policy(model)
    policy.save_pretrained(tmp_path / "model")
    assert sorted(f.name for f in (tmp_path / "model").glob("*.safetensors")) == ["model.safetensors"]
    expected = policy.logprobs(forest)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(Policy(stock).logprobs(forest), expected)
    loaded = Policy.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.logprobs(forest), expected)
    assert loaded.model.training
    assert stock.config._attn_implementation == loaded.model.config._attn_implementation == "sdpa"


def test_dtype_and_frozen(tmp_path: Path) -> None:
    Policy(tiny_model("qwen3", torch.float32)).save_pretrained(tmp_path)
    reference = Policy.from_pretrained(str(tmp_path), dtype="bfloat16", trainable=False)
    assert reference.model.dtype == torch.bfloat16
    assert not reference.model.training
    assert not any(p.requires_grad for p in reference.model.parameters())
    with pytest.raises(UserError, match="dtype 'float31'"):
        Policy.from_pretrained(tmp_path, dtype="float31")


def test_progress_bars_come_back(tmp_path: Path) -> None:
    logging.enable_progress_bar()
    Policy(tiny_model("qwen3", torch.float32)).save_pretrained(tmp_path)
    assert logging.is_progress_bar_enabled()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Policy(tiny_model("qwen3", torch.float32)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_missing_folder_and_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*absent"):
        Policy.from_pretrained(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        Policy.from_pretrained(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights \(model\.safetensors.*holds pytorch_model\.bin"):
        Policy.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(UserError, match=r"lacks 1 of 1 weight files, the first is model-1\.safetensors"):
        Policy.from_pretrained(folder)


def test_a_gguf_file_is_refused_with_what_makes_a_folder_of_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"python -m mosaic_fast\.setup\.gguf .*model\.gguf FOLDER"):
        Policy.from_pretrained(tmp_path / "model.gguf")


def test_bad_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard"}))
    with pytest.raises(UserError, match="'unheard' is not supported"):
        Policy.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Policy.from_pretrained(folder)


def test_bad_weights(folder: Path) -> None:
    """transformers goes on with random values where a weight is missing; we do not."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "q_norm" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing_keys.*q_norm"):
        Policy.from_pretrained(folder)
    save_file({**weights, "model.norm.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit.*model\.norm\.weight"):
        Policy.from_pretrained(folder)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged or cut short"):
        Policy.from_pretrained(folder)


def test_save_onto_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken is a file"):
        Policy(tiny_model("llama")).save_pretrained(tmp_path / "taken")
