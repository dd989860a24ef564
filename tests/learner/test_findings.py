"""A step that teaches nothing, or explodes, says so with the cause and the option to change."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mosaic_fast.config import Config, LossConfig, OptimConfig, RolloutConfig
from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.errors import TrainingError
from mosaic_fast.learner.learner import Learner, Reference
from mosaic_fast.learner.step_batch import step_batch
from mosaic_fast.policy import Policy
from mosaic_fast.run.findings import Finding, Findings, rollout_findings, update_findings
from mosaic_fast.run.folder import RunFolder
from mosaic_fast.run.progress import ProgressView
from mosaic_fast.train import train
from mosaic_rollout.loop.agent_loop import Limits
from mosaic_rollout.types import Rollout, Task
from tests.learner.rollouts_for_tests import make_rollout
from tests.policy.policy_helpers import tiny_model

LIMITS = Limits(max_steps=3, max_step_tokens=8, max_rollout_tokens=64)
CONFIG = Config(rollout=RolloutConfig(max_steps=3, max_step_tokens=8, max_rollout_tokens=64))
SOME = [np.array([1.0, -1.0])]


def ended(rollout: Rollout, observation: str | None) -> Rollout:
    *before, last = rollout.steps
    return replace(rollout, steps=(*before, replace(last, observation=observation)))


def too_long(task: str, tokens: int) -> Rollout:
    rollout = make_rollout(
        status="truncated", steps=0, token_ids=np.arange(tokens), trained=np.zeros(tokens, bool)
    )
    return replace(rollout, task=Task(task, "benign", "train"))


CUT_IN_TURN = make_rollout(status="truncated", steps=2, tokens_per_step=8)
AFTER_THREE = ended(make_rollout(status="truncated", steps=3), "output")
OUTPUT_TOO_LONG = ended(make_rollout(status="truncated", steps=2), "output")
AT_THE_END = make_rollout(status="truncated", steps=1, tokens_per_step=63)


def texts(rollouts: Sequence[Rollout], advantages: list[np.ndarray] | None = None, **update: object) -> str:
    """All that is said of one group."""
    config = CONFIG.model_copy(update=update)
    return "\n".join(f.text for f in rollout_findings([rollouts], advantages or SOME, config, LIMITS))


@pytest.mark.parametrize(
    ("rollouts", "said"),
    [
        ([CUT_IN_TURN] * 8, "all 8 rollouts were cut off at rollout.max_step_tokens = 8; raise it"),
        ([AFTER_THREE] * 2, "all 2 rollouts were cut off at rollout.max_steps = 3; raise it"),
        ([OUTPUT_TOO_LONG] * 2, "all 2 rollouts were cut off at rollout.max_rollout_tokens = 64; raise it"),
        ([AT_THE_END] * 2, "all 2 rollouts were cut off at rollout.max_rollout_tokens = 64; raise it"),
        ([CUT_IN_TURN, CUT_IN_TURN, AFTER_THREE], "tokens = 8; raise it, 1 at rollout.max_steps = 3"),
        (
            [too_long("essay", 900), make_rollout()],
            "task essay has 900 tokens, rollout.max_rollout_tokens is 64, raise it: 1 of 2 rollouts",
        ),
        ([too_long("essay", 900)] * 2, "no token was sampled, so none is trained"),
        ([make_rollout(status="malformed", well_formed=False)] * 4, "all 4 rollouts ended by an action"),
        ([make_rollout(status="malformed")] * 4, "set rollout.teach_loop = true"),
    ],
)  # fmt: skip
def test_what_all_rollouts_have_in_common_is_said_with_the_option(rollouts: list[Rollout], said: str):
    assert said in texts(rollouts)


@pytest.mark.parametrize("one", [CUT_IN_TURN, make_rollout(status="malformed")])
def test_what_some_rollouts_do_is_no_finding(one: Rollout):
    assert texts([one, make_rollout()]) == ""


def test_the_models_own_end_is_no_option_of_the_configuration():
    config = Config(rollout=RolloutConfig(max_rollout_tokens=500))
    for group, said in (
        ([AT_THE_END] * 2, "at the model's 64 tokens; use shorter prompts"),
        ([too_long("essay", 70)] * 2, "the model takes 64: 2 of 2"),
    ):
        assert said in "\n".join(f.text for f in rollout_findings([group], SOME, config, LIMITS))


def test_ties_say_why_they_may_be_ties():
    none = [np.zeros(2)]
    other = make_rollout(steps=2)
    assert "same text: raise rollout.temperature" in texts([make_rollout(), make_rollout()], none)
    assert "rule judge" in texts([make_rollout(), other], none)
    assert "tie" not in texts([make_rollout(), other])


def test_tasks_that_repeat_within_a_step_are_named():
    groups = [[make_rollout()] * 2, [make_rollout()] * 2]
    (found,) = rollout_findings(groups, SOME * 2, CONFIG, LIMITS)
    assert "2 groups are of 1 tasks" in found.text
    assert "rollout.prompts_per_step" in found.text


SOUND = {"optim/grad_norm": 1.0, "policy/kl": 0.1, "policy/ratio": 1.0, "policy/dropped_tokens": 0.0}


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"optim/grad_norm": 0.0}, "the gradient is zero"),
        ({"optim/grad_norm": 0.0, "policy/clip_frac": 1.0}, "widen loss.clip_low"),
        ({"optim/grad_norm": 0.0, "mismatch/masked_frac": 1.0}, "widen off_policy.mask_below"),
        ({"optim/grad_norm": 5e5}, "norm is 5e+05, optim.grad_clip cuts it to 1: lower optim.lr"),
        ({"policy/kl": 50.0}, "the KL to the reference is 50 a token"),
        ({"policy/kl": math.inf}, "not finite, and so not in metrics.jsonl: policy/kl"),
        ({"policy/kl": math.nan}, "lower optim.lr"),
        ({"policy/ratio": 400.0}, "lower optim.lr or optim.epochs"),
        ({"policy/ratio": 0.01}, "mean ratio of new to old policy is 0.01"),
        ({"policy/ratio": math.nan}, "mean ratio of new to old policy is nan"),
        ({"mismatch/kl": 3.0}, "set off_policy.truncate_at"),
        ({"policy/dropped_tokens": 4.0}, "4 of 20 token terms were left out"),
    ],
)
def test_an_update_that_fails_or_explodes_says_so(figures: dict[str, float], said: str):
    found = update_findings(SOUND | figures, 10, Config())
    assert any(said in finding.text for finding in found), found


def test_a_sound_update_says_nothing():
    assert update_findings(SOUND, 10, Config()) == []
    assert update_findings(SOUND, 10, Config(), step=0) == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("optim/grad_norm", 20.0, "lower optim.lr"),
        ("policy/kl", 0.5, "the KL to the reference is 0.5"),
        ("policy/ratio", 2.0, "lower optim.lr or optim.epochs"),
    ],
)
def test_first_steps_are_watched_more_closely(name: str, value: float, said: str):
    """What is unusual at first is allowed later; either way it is said in one line and no second one."""
    (found,) = update_findings(SOUND | {name: value}, 10, Config(), step=4)
    assert said in found.text
    assert update_findings(SOUND | {name: value}, 10, Config(), step=5) == []


def test_shares_of_the_first_rollouts_are_watched():
    sound, lost = make_rollout(), make_rollout(status="malformed", well_formed=False)

    def said(group: list[Rollout], step: int = 0) -> str:
        found = rollout_findings([group], SOME, CONFIG, LIMITS, step)
        return "\n".join(finding.text for finding in found)

    assert (
        said([sound] * 4)
        == said([sound, sound, lost, sound])
        == said([CUT_IN_TURN, sound, sound, sound])
        == ""
    )
    assert "1 of 4 rollouts keep to the format" in said([sound, lost, lost, lost])
    assert "python -m mosaic_fast.sft" in said([sound, lost, lost, lost])
    cut = said([CUT_IN_TURN, CUT_IN_TURN, AFTER_THREE, sound])
    assert cut == "3 of 4 rollouts were cut off, 2 of them at rollout.max_step_tokens = 8; raise it"
    assert said([sound, lost, lost, lost], step=5) == ""


def test_a_cause_is_said_once_and_again_after_a_while():
    findings = Findings()
    lasting, other = Finding("a", "A"), Finding("b", "B")
    both = {step: findings.to_say(step, [lasting, *([other] * (step == 5))]) for step in range(1, 46)}
    said = {step: texts for step, (texts, _) in both.items()}
    assert {step: texts for step, texts in said.items() if texts} == {
        1: ["A"],
        5: ["B"],
        21: ["A"],
        41: ["A"],
    }
    assert [step for step, (_, known) in both.items() if known != ["a"]] == [1, 21, 41]
    static = Finding("c", "C", lasts=False)
    assert [findings.to_say(step, [static]) for step in (50, 51)] == [(["C"], []), ([], [])]


def test_a_step_line_ends_with_its_notes(capsys: pytest.CaptureFixture[str]):
    view = ProgressView("plain", total_steps=2, done=0)
    view.step({"step": 1.0}, ["all rollouts [were] cut"])
    view.step({"step": 2.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["step 1  ! all rollouts [were] cut", "step 2"]


@pytest.mark.parametrize("name", ["grpo", "gspo", "dpo", "dr_grpo"])
def test_an_update_without_a_trained_token_is_an_update_of_zero(name: str):
    """Every prompt too long: nothing to forward, no division by zero, and the figures are finite."""
    model = tiny_model("qwen2")
    loss = LossConfig.model_validate({"name": name})
    settings = Config(steps=2, loss=loss, optim=OptimConfig(epochs=2))
    reference = None
    if settings.loss.needs_reference:
        reference = Reference(Policy(tiny_model("qwen2")))
    group = [too_long("essay", 5), too_long("essay", 5)]
    batch = step_batch([group], [np.full((2, 2), 0.5)], [np.zeros(2)], [np.zeros(2)])
    before = [p.detach().clone() for p in model.parameters()]
    figures = Learner(Policy(model), reference, settings).update(batch, 0)
    assert figures["optim/grad_norm"] == 0.0
    assert all(math.isfinite(value) for value in figures.values()), figures
    assert all((a == b).all() for a, b in zip(before, model.parameters(), strict=True))
    assert any("gradient is zero" in f.text for f in update_findings(figures, 0, settings))


OPTIONS = [
    *(
        "--steps",
        "1",
        "--rollout.prompts-per-step",
        "2",
        "--rollout.group-size",
        "2",
        "--env.eval-tasks",
        "0",
    ),
    *("--rollout.max-step-tokens", "3", "--trackers.console", "plain"),
]


def test_a_run_whose_rollouts_are_all_cut_off_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In the step's line, in notes.jsonl, and as the end of a run that requires a signal."""
    cause = "all 4 rollouts were cut off at rollout.max_step_tokens = 3; raise it"
    config, _, name = parse_train_arguments([*OPTIONS, "--run-dir", str(tmp_path / "run")])
    assert train(config, name) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1")]
    assert cause in line
    rows = [json.loads(row) for row in (tmp_path / "run" / "notes.jsonl").read_text().splitlines()]
    assert {"step": 1, "note": cause} in rows

    more = ["--reward.require-signal", "--run-dir", str(tmp_path / "strict")]
    config, _, name = parse_train_arguments([*OPTIONS, *more])
    with pytest.raises(TrainingError, match=f"step 1: there is nothing to learn from: {cause}; every group"):
        train(config, name)


def test_a_resumed_run_forgets_the_notes_of_later_steps(tmp_path: Path):
    config = Config(run_dir=str(tmp_path)).resolved()
    with RunFolder(config, "x", resume=True) as folder:
        folder.open(config, 0)
        for step in (1, 2, 3):
            folder.append_notes(step, [f"of {step}", "more"])
        folder.append_notes(4, [])
        with folder.notes_path.open("a") as file:
            file.write('{"step": 1, "no')
    with RunFolder(config, "x", resume=True) as folder:
        folder.open(config, 2)
    kept = [json.loads(line)["step"] for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert kept == [1, 1, 2, 2]
