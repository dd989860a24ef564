"""Model folders as people have them: loaded right, or refused in one line that says what to do."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mosaic_fast.cli import run_cli
from mosaic_fast.config import Config
from mosaic_fast.config.learning import ModelConfig
from mosaic_fast.config.rollout import RolloutConfig
from mosaic_fast.errors import UserError
from mosaic_fast.policy import Policy
from mosaic_fast.setup.build import build_setup
from mosaic_fast.setup.engine import longest_rollout, why_shorter
from mosaic_fast.train import main
from mosaic_rollout.engine import LocalEngine
from tests.policy.policy_helpers import CONFIGS, tiny_model
from tools.warmstart.tokenizer import build_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny qwen3 with the embedded model's tokenizer, in one file and, under `shards`, in several."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), build_tokenizer()
    config = type(CONFIGS["qwen3"]).from_dict(CONFIGS["qwen3"].to_dict() | {"vocab_size": len(tokenizer)})
    config.max_position_embeddings = 2048
    model = AutoModelForCausalLM.from_config(config)
    for name, size in (("one", "1GB"), ("shards", "10KB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        tokenizer.save_pretrained(folder / name)
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    return folder


def load(folder: Path) -> None:
    config = Config(model=ModelConfig(path=str(folder), device="cpu"), rollout=RolloutConfig(teach_loop=True))
    build_setup(config, folder).engine.close()


def edited(name: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
        change(values)
        (folder / name).write_text(json.dumps(values), encoding="utf-8")

    return edit


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        change(values)
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    save_file({"base_model.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")


def adapter_below(folder: Path) -> None:
    (folder / "adapter").mkdir()
    adapter(folder / "adapter")


def adapter_only(folder: Path) -> None:
    adapter(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def quantised(**settings: object) -> Callable[[Path], None]:
    return edited("config.json", lambda c: c.update(quantization_config=settings))


def a_shard(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(sorted(folder.glob("model-*.safetensors"))[1])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def more_tokens(folder: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|added|>", "<|another|>"])
    tokenizer.save_pretrained(folder)


ODD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "adapter beside weights": ("one", adapter, r"adapter .* beside a model's weights.*merge_and_unload"),
    "adapter alone": (
        "one",
        adapter_only,
        r"an adapter .* and no model.*base, 'some/base'",
    ),
    "gptq": ("one", quantised(quant_method="gptq", bits=4), r"quantization_config.*\(gptq\).*quantised"),
    "fp8": ("one", quantised(quant_method="fp8"), r"\(fp8\)"),
    "mxfp4": ("one", quantised(quant_method="mxfp4"), r"\(mxfp4\)"),
    "bitsandbytes": ("one", quantised(load_in_4bit=True), "quantised weights cannot be trained"),
    "compressed-tensors, old": (
        "one",
        edited("config.json", lambda c: c.update(compression_config={"quant_method": "sparse"})),
        "compression_config",
    ),
    "nested": (
        "one",
        edited("config.json", lambda c: c.update(text_config={"quantization_config": {"bits": 4}})),
        "quantised",
    ),
    "gptq, its own file": (
        "one",
        edited("quantize_config.json", lambda c: c.update(bits=4)),
        "quantize_config",
    ),
    "modelopt": ("one", edited("hf_quant_config.json", lambda c: c.update(x=1)), "hf_quant_config"),
    "int8 by dtype alone": (
        "one",
        weights(lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(torch.int8)})),
        r"model\.norm\.weight is of type I8",
    ),
    "fp8 by dtype alone": (
        "one",
        weights(lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(torch.float8_e4m3fn)})),
        r"is of type F8_E4M3",
    ),
    "scales left over": (
        "one",
        weights(lambda w: w.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)})),
        r"unexpected_keys: .*weight_scale",
    ),
    "biases dropped": (
        "one",
        weights(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)})),
        r"unexpected_keys: .*q_proj\.bias",
    ),
    "a value head": (
        "one",
        weights(lambda w: w.update({"v_head.x": torch.ones(1)})),
        "unexpected_keys: v_head",
    ),
    "a layer missing": (
        "one",
        weights(lambda w: [w.pop(name) for name in list(w) if "layers.1" in name]),
        r"missing_keys: .*layers\.1.*in all",
    ),
    "NaN": (
        "one",
        weights(lambda w: w["model.norm.weight"].fill_(float("nan"))),
        r"NaN or infinite values, the first in model\.norm",
    ),
    "pickles": ("one", pickled, r"holds pytorch_model\.bin; pickles are never opened"),
    "git-lfs weights": (
        "one",
        lambda f: (f / "model.safetensors").write_text(POINTER),
        r"model\.safetensors is a Git LFS pointer.*git lfs pull",
    ),
    "git-lfs tokenizer": (
        "one",
        lambda f: (f / "tokenizer.json").write_text(POINTER),
        r"tokenizer\.json is a Git LFS pointer",
    ),
    "no vocabulary": (
        "one",
        lambda f: (f / "tokenizer.json").unlink(),
        r"knows no ordinary text: .*put the tokenizer\.json there|no usable tokenizer",
    ),
    "git-lfs shard": ("shards", a_shard(lambda p: p.write_text(POINTER)), r"model-00002.*Git LFS pointer"),
    "a shard missing": ("shards", a_shard(Path.unlink), r"lacks 1 of \d+ weight files, .*model-00002"),
    "a shard cut short": ("shards", a_shard(cut), r"model-00002.* damaged or cut short"),
    "a shard empty": ("shards", a_shard(lambda p: p.write_bytes(b"")), r"model-00002.* damaged or cut short"),
    "a shard of text": ("shards", a_shard(lambda p: p.write_text("<html>" * 99)), "damaged or cut short"),
    "tokens without an embedding": ("one", more_tokens, r"2 tokens beyond .*resize_token_embeddings"),
    "vision and language": (
        "one",
        edited("config.json", lambda c: c.update(model_type="qwen2_5_vl")),
        "load its language model alone",
    ),
    "remote code": (
        "one",
        edited("config.json", lambda c: c.update(model_type="mine", auto_map={"AutoModel": "x.Y"})),
        "code of its own .* never run",
    ),
    "no positions": (
        "one",
        edited("config.json", lambda c: c.update(max_position_embeddings=None)),
        "max_position_embeddings",
    ),
    "one position": (
        "one",
        edited("config.json", lambda c: c.update(max_position_embeddings=1)),
        "max_position_embeddings",
    ),
    "heads that do not divide": (
        "one",
        edited("config.json", lambda c: c.update(num_attention_heads=3)),
        "num_attention_heads|mismatched|RuntimeError",
    ),
    "generation settings of no sense": (
        "one",
        edited("generation_config.json", lambda c: c.update(num_beams=-1, early_stopping="x")),
        r"generation_config",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_folder_is_refused_in_one_line(sound: Path, tmp_path: Path, kind: str):
    source, damage, said = ODD[kind]
    folder = shutil.copytree(sound / source, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=said) as error:
        load(folder)
    assert len(str(error.value).splitlines()) == 1


FINE: dict[str, Callable[[Path], object]] = {
    "as it is": lambda folder: None,
    "an adapter in a folder of its own": lambda f: adapter(
        f / "adapter" if (f / "adapter").mkdir() is None else f
    ),
    "buffers of old": weights(
        lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    ),
    "the head beside the embedding it is tied to": weights(
        lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    ),
    "half precision": weights(lambda w: w.update({name: t.half() for name, t in w.items()})),
    "sampling settings without sampling": edited(
        "generation_config.json", lambda c: c.update(temperature=0.6)
    ),
    "remote code of a family that transformers has": edited(
        "config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    ),
    "no generation_config": lambda f: (f / "generation_config.json").unlink(missing_ok=True),
}


@pytest.mark.parametrize("kind", FINE)
def test_what_looks_odd_and_is_fine_is_loaded_and_can_be_saved(sound: Path, tmp_path: Path, kind: str):
    folder = shutil.copytree(sound / "one", tmp_path / "model")
    FINE[kind](folder)
    load(folder)
    policy = Policy.from_pretrained(folder)
    policy.save_pretrained(tmp_path / "saved")
    again = Policy.from_pretrained(tmp_path / "saved").model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in policy.model.state_dict().items())


def test_a_head_of_its_own_under_a_tied_config_is_kept(sound: Path, tmp_path: Path):
    """transformers unties them, and config.json would not say so: the next load would be another model."""
    folder = shutil.copytree(sound / "one", tmp_path / "model")
    weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))(folder)
    model = Policy.from_pretrained(folder).model
    assert not model.config.tie_word_embeddings
    Policy(model).save_pretrained(tmp_path / "saved")
    again = Policy.from_pretrained(tmp_path / "saved").model
    assert torch.equal(again.lm_head.weight, again.model.embed_tokens.weight + 1)  # pyrefly: ignore


def test_the_command_says_it_in_one_line_and_leaves_no_folder(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = shutil.copytree(sound / "one", tmp_path / "model")
    adapter(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--model.path", str(folder)])
    assert run_cli(main) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("case", "rope", "longest"),
    [
        *(("qwen2", None, 64), ("phi3-window", None, 64), ("llama-bias", None, 64)),
        *(("longrope", None, 6), ("llama", DYNAMIC, 63)),
    ],
)
def test_the_longest_rollout_is_what_engine_and_trainer_can_do(case: str, rope: object, longest: int):
    model = tiny_model(case, torch.float32)
    if rope is not None:
        config = type(model.config).from_dict(model.config.to_dict() | {"rope_parameters": rope})
        model = AutoModelForCausalLM.from_config(config)
    policy, config = Policy(model), Config()
    assert longest_rollout(config, policy) == longest
    assert longest <= LocalEngine(model)._model.max_tokens
    told = why_shorter(config, policy)
    assert told is not None
    assert f"at most {longest} tokens" in told
    assert "rollout.max_rollout_tokens = 512" in told
    short = Config(rollout=RolloutConfig(max_rollout_tokens=longest, max_step_tokens=longest))
    assert longest_rollout(short, policy) == longest
    assert why_shorter(short, policy) is None
