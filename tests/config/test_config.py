"""Configuration: what is accepted, and that a mistake is named with its key."""

import subprocess
import sys
from pathlib import Path

import pytest

from mosaic_fast.config import Config
from mosaic_fast.config.read import load_config, parse_train_arguments, save_config
from mosaic_fast.errors import UserError


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stepz = 3", "stepz: no such key; did you mean steps?"),
        ("[loss]\nnam = 'grpo'", "loss.nam: no such key; did you mean loss.name?"),
        ("[loss]\nxyz = 1", "loss.xyz: no such key; there are name, clip_low"),
        ("[nothing]\nx = 1", "nothing: no such key; there are steps, seed"),
        ("[rolout]\ngroup_size = 4", "rolout: no such key; did you mean rollout.group_size?"),
        ("[optim]\ngroup_size = 4", "optim.group_size: no such key; did you mean rollout.group_size?"),
        ("[judge]\nApi-Key-Env = 'K'", "judge.Api-Key-Env: no such key; did you mean judge.api_key_env?"),
        ("steps = '3'", "steps = '3': Input should be a valid integer"),
        ("steps = 0", "steps = 0: Input should be greater than or equal to 1"),
        ("[optim]\nlr = -1", "optim.lr = -1"),
        ("[optim]\nlr = nan", "optim.lr = nan"),
        ("[rollout]\ngroup_size = 1", "rollout.group_size = 1"),
        ("[rollout]\nbranching = 'tree'", "rollout.branching = 'tree'"),
        ("[rollout]\ntop_p = 0.9", "top_p cannot be used in training"),
        ("[rollout]\ntop_k = 20", "top_k cannot be used in training"),
        ("[loss]\nname = 'dpo'\nclip_low = 0.1", "loss.clip_low has no meaning for loss.name = 'dpo'"),
        ("[loss]\nname = 'ipo'\nkl_weight = 0.1", "loss.kl_weight has no meaning for loss.name = 'ipo'"),
        ("[loss]\nbeta = 0.1", "loss.beta has no meaning for loss.name = 'grpo'"),
        ("[loss]\nname = 'ppo'", "loss.name = 'ppo'"),
        ("[loss]\nname = 'dpo'\n[forest]\ncredit = 'mean'", "forest.credit = 'mean' needs a loss on rewards"),
        ("[loss]\nname = 'dpo'\n[off_policy]\ntruncate_at = 2.0", "off_policy corrects losses on rewards"),
        ("[forest]\ncredit = 'subtree'", "forest.credit = 'subtree' compares branches"),
        ("[off_policy]\nmask_below = 2.0\nmask_above = 1.0", "mask_below (2.0) must be below"),
        ("[model]\nlora_alpha = 4", "model.lora_alpha and model.lora_targets need model.lora_rank"),
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


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--seed -1", "seed = -1: Input should be greater than or equal to 0"),
        ("--steps 4 --optim.warmup-steps 9", "optim.warmup_steps (9) must be below steps (4)"),
        ("--forest.tokens-per-microbatch 10", "tokens_per_microbatch (10) is below"),
        ("--judge.name llm", "judge.name = 'llm' needs judge.endpoint"),
        ("--loss.nam grpo", "loss.nam: no such key; did you mean loss.name (--loss.name)?"),
        ("--rollout.grup-size=8", "did you mean rollout.group_size (--rollout.group-size)?"),
        ("--group-size 8", "did you mean rollout.group_size (--rollout.group-size)?"),
        ("--enviroment.name world", "did you mean env.name (--env.name)?"),
        ("--rolout.group-size 8", "did you mean rollout.group_size (--rollout.group-size)?"),
        ("--judge.a.b 8", "judge.a: no such key; "),
        ("--resum", "did you mean resume (--resume)?"),
        ("--dryrun", "did you mean dry_run (--dry-run)?"),
        ("--rollout.top-p 0.9", "top_p cannot be used in training"),
        ("--rollout.top_k=20", "top_k cannot be used in training"),
        ("--seed 3 stray", "'stray', which belongs to no option"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_as_in_a_file(options: str, named: str):
    with pytest.raises(UserError) as error:
        parse_train_arguments(options.split())
    assert named in str(error.value)
    assert "pydantic" not in str(error.value)


def test_a_reader_that_has_had_enough_is_no_error():
    command = f"{sys.executable} -m mosaic_fast.train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage")
    assert "Traceback" not in done.stderr


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no configuration file .*none\.toml"):
        parse_train_arguments([str(tmp_path / "none.toml")])


def test_a_written_configuration_reads_back_the_same(tmp_path: Path):
    config = Config(steps=3, run_dir="x")
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


def test_what_a_loss_leaves_open_is_its_own_and_is_written_down(tmp_path: Path):
    """Options come after the loss's own values, and the run folder's file says all of them."""
    for name, low, high, normalisation, kl_weight, divide in (
        ("grpo", 0.2, 0.2, "token", 0.01, True),
        ("dapo", 0.2, 0.28, "token", 0.0, True),
        ("dr_grpo", 0.2, 0.2, "constant", 0.0, False),
        ("gspo", 3e-4, 4e-4, "sequence", 0.0, True),
        ("cispo", 1.0, 4.0, "token", 0.0, True),
    ):
        config, _, _ = parse_train_arguments(["--loss.name", name])
        loss = config.loss
        assert (loss.clip_low, loss.clip_high, loss.normalisation, loss.kl_weight) == (
            *(low, high, normalisation, kl_weight),
        )
        assert config.reward.divide_by_std is divide
        assert loss.needs_reference == (kl_weight > 0)
        save_config(config, tmp_path / "config.toml")
        assert load_config(tmp_path / "config.toml") == config
    pairwise, _, _ = parse_train_arguments(["--loss.name", "dpo_norm"])
    assert (pairwise.loss.beta, pairwise.loss.clip_low, pairwise.loss.needs_reference) == (5.0, None, True)
    chosen, _, _ = parse_train_arguments(["--loss.name", "dapo", "--loss.clip-high", "0.5"])
    assert (chosen.loss.clip_low, chosen.loss.clip_high) == (0.2, 0.5)


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
    code = "import sys, mosaic_fast.config, mosaic_fast.config.read; sys.exit('torch' in sys.modules)"
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
