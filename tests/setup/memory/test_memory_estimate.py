"""The estimate of a run's memory against what the run takes, and the command that prints it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedConfig, Qwen2Config, Qwen3Config

import mosaic_fast.train as train
from mosaic_fast.cli import run_cli
from mosaic_fast.config import Config, ModelConfig
from mosaic_fast.config.read import load_config, parse_train_command
from mosaic_fast.learner.execution import Execution
from mosaic_fast.policy import StockDecoder
from mosaic_fast.setup.memory import estimate as memory
from mosaic_fast.setup.memory import estimate_memory
from mosaic_fast.setup.memory.estimate import PHASES
from mosaic_fast.setup.memory.table import verdict
from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.types import Request, SamplingParams
from tests.rollout.engine.helpers import tokens_held
from tests.setup.memory.small_models import (
    LENGTH,
    ROLLOUTS,
    SHAPES,
    Variant,
    learner_of,
    peak_bytes,
    step,
    update_is_as_estimated,
)

CONFIGS = Path(__file__).parents[3] / "configs"
GIB = 2**30

# The published shapes and parameter counts.
PUBLISHED: dict[str, tuple[PreTrainedConfig, int]] = {
    "qwen2.5-7b": (
        Qwen2Config.from_dict(
            {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
            }
        ),
        7_615_616_512,
    ),
    "qwen3-4b-thinking": (
        Qwen3Config.from_dict(
            {
                "vocab_size": 151936,
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "tie_word_embeddings": True,
                "max_position_embeddings": 262144,
            }
        ),
        4_022_468_096,
    ),
    "phi-4": (
        Phi3Config.from_dict(
            {
                "vocab_size": 100352,
                "hidden_size": 5120,
                "intermediate_size": 17920,
                "num_hidden_layers": 40,
                "num_attention_heads": 40,
                "num_key_value_heads": 10,
                "max_position_embeddings": 16384,
                "original_max_position_embeddings": 16384,
                "pad_token_id": None,
            }
        ),
        14_659_507_200,
    ),
}
PUBLISHED["qwen2.5-7b-lora"] = PUBLISHED["qwen2.5-7b"]

VARIANTS = [
    *(Variant(family) for family in SHAPES),
    Variant("qwen3", checkpointed=True),
    Variant("qwen3", dtype="bfloat16"),
    Variant("qwen2", dtype="bfloat16", checkpointed=True),
    Variant("qwen3", lora_rank=4),
    Variant("phi3", lora_rank=4, checkpointed=True),
    Variant("qwen3", loss="dpo"),
]


PRESET_MODELS = [  # about 0.5, 3.7 and 3.3 B weights
    ("laptop", 24, (1024, 3072), 2, 16),
    ("lora-24gb", 36, (2560, 9728), 8, 24),
    ("full-80gb", 28, (3072, 8192), 8, 80),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_estimate_of_an_update_is_what_it_takes(variant: Variant, tmp_path: Path):
    """Weights, copies and averages to the byte; the height of an update over two micro-batches to 5%."""
    update_is_as_estimated(variant, tmp_path)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_held_prefixes_are_within_the_estimate(checkpointed: bool, tmp_path: Path):
    """An upper limit: as if all of a micro-batch were held."""
    variant = Variant("qwen3", checkpointed=checkpointed, microbatch=LENGTH + 40)
    config = variant.config(tmp_path)
    estimate = estimate_memory(config)
    learner = learner_of(variant, config)
    learner._execution = Execution(LENGTH + 40, 1.0, learner.policy.model.config, plan="kept")
    always = sum(part.bytes for part in estimate.components if part.phases == PHASES)
    limit = estimate.total("update") - always
    taken = peak_bytes(lambda: learner.update(step(shared=120), 1))
    assert 0.5 * limit < taken <= limit


def test_the_engines_keys_and_values_are_within_the_estimate(tmp_path: Path):
    """In full length and number; and the engine gives them back when it is told to."""
    config = Variant("qwen3").config(tmp_path)
    estimate = estimate_memory(config)
    rollouts = estimate.total("rollouts") - estimate.total("checkpoint")
    logits = next(part.bytes for part in estimate.components if part.name == "logits to sample from")
    engine = LocalEngine(
        AutoModelForCausalLM.from_config(SHAPES["qwen3"]),
        max_batch=2 * ROLLOUTS,
        max_cached_tokens=200_000,
        decoder_of=StockDecoder.of,
    )
    rng = np.random.default_rng(0)
    requests = [
        Request(
            rng.integers(0, 1500, 40), SamplingParams(max_new_tokens=LENGTH - 40), seed=0, rollout_key=key
        )
        for key in range(2 * ROLLOUTS)
    ]
    asyncio.run(engine.generate(requests))
    pool, rows = engine._scheduler.tree.pool, engine._scheduler.buffer
    assert 0.3 * (rollouts - logits) < pool.bytes + rows.bytes <= rollouts - logits
    assert tokens_held(engine) > 0
    asyncio.run(engine.release())
    assert tokens_held(engine) == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_familys_run_is_estimated_from_its_published_shape(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The command ends well, says each component, and leaves nothing behind."""
    shape, parameters = PUBLISHED[name]
    model, run = tmp_path / "model", tmp_path / "run"
    shape.save_pretrained(model)
    arguments = [str(CONFIGS / f"{name}.toml"), "--model.path", str(model), "--run-dir", str(run)]
    monkeypatch.setattr("sys.argv", ["train", *arguments, "--dry-run"])
    assert run_cli(train.main) == 0
    shown = capsys.readouterr().out
    parts = ["weights", "AdamW's averages", "gradients", "activations", "LM head", "SGLang: weights", "total"]
    parts += ["adapters", "merged weights"] if "lora" in name else ["fp32 master weights", "reference policy"]
    assert [part for part in parts if part not in shown] == []
    assert not run.exists()

    config = parse_train_command(arguments).config
    estimate = estimate_memory(config)
    adapters = sum(part.bytes for part in estimate.components if part.name == "adapters")
    assert estimate.parameters - adapters // 4 == parameters
    one_gpu = 0.9 * 80e9
    assert (estimate.peak < one_gpu) == ("lora" in name)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path):
    config = load_config(path)
    assert config.rollout.group_size == 4
    if path.stem in PUBLISHED:  # what the paper states, or summaries of it do
        stated = (config.env.name, config.judge.name, config.judge.mode, config.loss.name)
        assert stated == ("agent_safetybench", "llm", "pairwise", "grpo")
        assert config.reward.length_target == 400


def test_a_dry_run_is_no_part_of_the_configuration():
    dry, plain = (parse_train_command([*more, "--seed", "3"]) for more in (["--dry-run"], []))
    assert dry.config == plain.config
    assert (dry.dry_run, plain.dry_run) == (True, False)


def test_the_default_run_is_estimated_and_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["train", "--dry-run"])
    assert run_cli(train.main) == 0
    shown = capsys.readouterr().out
    assert "embedded: 0.6" in shown  # M parameters
    assert "fits this machine's memory" in shown


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch):
    estimate = estimate_memory(Config())
    monkeypatch.setattr("os.sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else estimate.peak)
    [line] = verdict(estimate)
    assert "too much for this machine's memory" in line
    monkeypatch.setattr("os.sysconf", lambda name: 2 if name == "SC_PHYS_PAGES" else estimate.peak)
    assert "fits" in verdict(estimate)[0]


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (None, "model.path: there is no folder"),
        ("", "holds no config.json"),
        ("{", "is not valid JSON"),
        ('{"model_type": "t5", "is_encoder_decoder": true}', "take a decoder-only model"),
        ('{"model_type": "gemma3", "text_config": {}}', "load its language model alone"),
        (
            '{"model_type": "falcon_mamba", "num_hidden_layers": 2}',
            "mixes positions outside attention",
        ),
        ('{"model_type": "qwen3", "hidden_size": "wide"}', "config.json: "),
    ],
)
def test_a_model_that_cannot_be_estimated_is_named(
    described: str | None,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    model = tmp_path / "model"
    if described is not None:
        model.mkdir()
    if described:
        (model / "config.json").write_text(described)
    monkeypatch.setattr("sys.argv", ["train", "--model.path", str(model), "--dry-run"])
    assert run_cli(train.main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert str(model) in error


def test_micro_batches_are_as_large_as_a_gpus_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest multiple of 1,024 that is estimated to fit; a rollout always does; on a CPU the usual."""
    config = Variant("qwen3").config(tmp_path)

    def sized(tokens: int, device: str) -> Config:
        values = config.model_dump()
        values["forest"]["tokens_per_microbatch"], values["model"]["device"] = tokens, device
        values["rollout"] |= {"prompts_per_step": 64, "max_rollout_tokens": 512, "max_step_tokens": 72}
        return Config.model_validate(values)

    def room(gib: float) -> None:
        monkeypatch.setattr(memory, "device_memory", lambda device: ("a GPU", int(gib * GIB)))

    def need(tokens: int) -> float:
        return estimate_memory(sized(tokens, "cuda")).total("update") / (1 - memory.SPARE_FRAC)

    room(0.5)
    found = memory.microbatch_tokens(sized(0, "cuda"))
    assert found % 1024 == 0
    assert need(found) <= 0.5 * GIB < need(found + 1024)
    assert estimate_memory(sized(0, "cuda")).tokens == found
    room(0.001)
    assert memory.microbatch_tokens(sized(0, "cuda")) == 512
    room(100.0)
    assert memory.microbatch_tokens(sized(0, "cuda")) == memory.MOST_TOKENS
    assert memory.microbatch_tokens(sized(0, "cpu")) == 8192
    assert memory.microbatch_tokens(sized(2048, "cuda")) == 2048


@pytest.mark.parametrize(("preset", "layers", "sizes", "kv_heads", "gib"), PRESET_MODELS)
def test_a_preset_fits_the_largest_model_that_it_names(
    preset: str, layers: int, sizes: tuple[int, int], kv_heads: int, gib: int, tmp_path: Path
):
    """Models of as many keys and values as their families have; a tenth of the memory stays free."""
    hidden, inner = sizes
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 152064,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 128,
        "num_attention_heads": hidden // 128, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = Config(preset=preset, model=ModelConfig(path=str(tmp_path), device="cpu"))
    assert estimate_memory(config).peak < 0.9 * gib * 2**30
