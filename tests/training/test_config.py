"""Configuration: what is accepted, and that a mistake is named with its key."""

import subprocess
import sys
from pathlib import Path

import pytest

from mosaic_fast.config import Config
from mosaic_fast.config_io import load_config, parse_train_arguments, save_config
from mosaic_fast.errors import UserError


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stepz = 3", "stepz: no such key; there are steps"),
        ("[loss]\nnam = 'grpo'", "loss.nam: no such key; there are name, clip_low"),
        ("[nothing]\nx = 1", "nothing: no such key"),
        ("steps = '3'", "steps = '3': Input should be a valid integer"),
        ("steps = 0", "steps = 0: Input should be greater than or equal to 1"),
        ("[optim]\nlr = -1", "optim.lr = -1"),
        ("[optim]\nlr = nan", "optim.lr = nan"),
        ("[rollout]\ngroup_size = 1", "rollout.group_size = 1"),
        ("[rollout]\nbranching = 'tree'", "rollout.branching = 'tree'"),
        ("[rollout]\ntop_p = 0.9", "rollout.top_p: no such key"),
        (
            "[forest]\ntokens_per_microbatch = 10",
            "tokens_per_microbatch (10) is below rollout.max_rollout_tokens",
        ),
        ("[optim]\nwarmup_steps = 99", "optim.warmup_steps (99) must be below steps"),
        ("steps = ", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, named: str):
    with pytest.raises(UserError) as error:
        load_config(Path(write(tmp_path / "run.toml", text)))
    assert named in str(error.value)


def test_options_override_the_file_which_is_validated_first(tmp_path: Path):
    good = write(tmp_path / "good.toml", "steps = 7\n[loss]\nkl_weight = 0.5")
    config, resume, name = parse_train_arguments([good, "--steps", "5"])
    assert (config.steps, config.loss.kl_weight, resume, name) == (5, 0.5, False, "good")
    bad = write(tmp_path / "bad.toml", "steps = 0")
    with pytest.raises(UserError, match="steps = 0"):
        parse_train_arguments([bad, "--steps", "5"])


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no configuration file .*none\.toml"):
        parse_train_arguments([str(tmp_path / "none.toml")])


def test_a_written_configuration_reads_back_the_same(tmp_path: Path):
    config = Config(steps=3, run_dir="x")
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


def test_resume_needs_an_existing_folder(tmp_path: Path):
    with pytest.raises(UserError, match="--resume needs --run-dir"):
        parse_train_arguments(["--resume"])
    with pytest.raises(UserError, match="there is no folder"):
        parse_train_arguments(["--resume", "--run-dir", str(tmp_path / "none")])


def test_resume_accepts_the_same_values_and_names_a_different_one(tmp_path: Path):
    save_config(Config(steps=9), tmp_path / "config.toml")
    run = ["--resume", "--run-dir", str(tmp_path)]
    assert parse_train_arguments(run)[0].steps == 9
    assert parse_train_arguments([*run, "--steps", "9"])[0].steps == 9
    with pytest.raises(UserError, match="steps: the run has 9, you ask for 4"):
        parse_train_arguments([*run, "--steps", "4"])
    toml = write(tmp_path / "again.toml", "[optim]\nlr = 0.1")
    with pytest.raises(UserError, match=r"optim\.lr: the run has"):
        parse_train_arguments([toml, *run])
    assert parse_train_arguments([toml, *run, "--optim.lr", str(Config().optim.lr)])[0].steps == 9


def test_the_configuration_needs_no_torch():
    code = "import sys, mosaic_fast.config, mosaic_fast.config_io; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]):
    """Every key has a text, and --help prints it under its own name."""
    with pytest.raises(SystemExit) as stopped:
        parse_train_arguments(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for section, field in Config.model_fields.items():
        model = field.annotation
        below = model.model_fields if hasattr(model, "model_fields") else {}
        for key, inner in {section: field, **{f"{section}.{k}": v for k, v in below.items()}}.items():
            if key == section and below:
                continue
            assert inner.description, key
            assert f"--{key.replace('_', '-')}" in shown, key


def test_the_documentation_has_every_key_with_its_text():
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    for field in Config.model_fields.values():
        section = field.annotation
        for key, inner in (section.model_fields if hasattr(section, "model_fields") else {}).items():
            assert f"| `{key}` |" in text, key
            assert " ".join(str(inner.description).split()) in text, key
