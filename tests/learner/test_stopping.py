"""Ctrl-C and SIGTERM at any moment: nothing done is lost or waited for, and a resume ends the same."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mosaic_fast.train as train
import mosaic_fast.training as training
from mosaic_fast.learner.checkpoint import latest_checkpoint
from mosaic_fast.learner.learner import Learner
from mosaic_fast.run import judge_groups as judged
from mosaic_fast.run import summary
from mosaic_fast.run.interrupt import Interrupt, Stopped
from mosaic_fast.setup import ready
from mosaic_rollout.engine import LocalEngine
from tests.run.test_run import assert_same_run, run

_STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def without_curves() -> Iterator[None]:
    """Drawing takes longer than the rest of such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "draw_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def short(options: list[str]) -> list[str]:
    return [
        *options,
        *("--steps", str(_STEPS), "--rollout.prompts-per-step", "1", "--rollout.group-size", "2"),
        *("--rollout.max-step-tokens", "8", "--rollout.max-steps", "2", "--env.eval-tasks", "3"),
        *("--env.eval-every", "1", "--checkpoint.every", "5"),
    ]


@pytest.fixture(scope="module")
def undisturbed(short: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(short, folder) == 0
    return folder


class _Signal:
    """Sends this process a SIGTERM the first time that `moment` comes, and counts what is played after it."""

    def __init__(self, moment: str) -> None:
        self.moment, self.sent, self.played_after = moment, False, 0

    def at(self, moment: str) -> None:
        if moment == self.moment and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def _watch(monkeypatch: pytest.MonkeyPatch, sent: _Signal) -> None:
    """Tell `sent` of every moment: "play 2" while the second step is played, "update 1", "evaluate 0", ..."""
    now = ["", 0]

    def around(owner: object, name: str, what: str, step_of: Callable[..., int]) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            now[:] = [what, step_of(*args, **kwargs)]
            sent.at(f"{what} {now[1]}")
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    around(train._Trainer, "evaluate", "evaluation", lambda trainer, count, step: step)
    around(train._Trainer, "_take", "rollouts", lambda trainer, step: step + 1)
    around(Learner, "update", "update", lambda learner, batch, step: step + 1)
    around(training, "save_checkpoint", "checkpoint", lambda *args, **kwargs: args[4].step)
    around(judged, "_judged", "judge", lambda judge, groups, config, folder, step: step + 1)
    generate = LocalEngine.generate

    async def generating(engine: LocalEngine, requests: object) -> object:
        sent.at(f"playing {now[0]} {now[1]}")
        completions = await generate(engine, requests)  # pyrefly: ignore [bad-argument-type]
        sent.played_after += sent.sent
        return completions

    monkeypatch.setattr(LocalEngine, "generate", generating)


_MOMENTS = {  # moment -> steps that are kept
    "playing evaluation 0": 0,
    "playing rollouts 1": 0,
    "playing rollouts 2": 1,
    "judge 2": 1,
    "update 1": 1,
    "playing evaluation 1": 1,
    "checkpoint 2": 2,
    "playing evaluation 2": 2,
}


@pytest.mark.parametrize("moment", _MOMENTS)
def test_stopped_at_any_moment_and_resumed_is_uninterrupted(
    short: list[str], undisturbed: Path, tmp_path: Path, moment: str, capfd: pytest.CaptureFixture[str]
):
    folder, sent = tmp_path / "run", _Signal(moment)
    with pytest.MonkeyPatch.context() as patch:
        _watch(patch, sent)
        assert run(short, folder) == 130
    assert sent.sent
    assert sent.played_after == 0 or not moment.startswith("playing"), (
        "what can be played again is not waited for"
    )
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    assert "go on with: python -m mosaic_fast.train --resume" in said.out
    kept = latest_checkpoint(folder / "checkpoints")
    steps = _MOMENTS[moment]
    done = steps or moment == "playing rollouts 1"  # the evaluation before training is kept as well
    assert (kept.name if kept else None) == (f"step-{steps:06d}" if done else None)
    assert not json.loads((folder / "summary.json").read_text())["complete"]
    assert run(short, folder, "--resume") == 0
    assert_same_run(undisturbed, folder, _STEPS)


def test_a_signal_while_a_run_is_set_up_leaves_no_folder(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ready, "build_judge", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    config, _, name = train.parse_train_command(short).config, False, "world"
    with pytest.raises(KeyboardInterrupt):
        train.train(config, name)
    assert list(tmp_path.iterdir()) == []


def test_the_second_signal_stops_at_once_and_the_first_only_what_is_abandonable():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(Stopped), interrupt.abandonable():
            pytest.fail("asked before: nothing is begun")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    with Interrupt() as interrupt, pytest.raises(Stopped), interrupt.abandonable():
        os.kill(os.getpid(), signal.SIGTERM)
    with Interrupt(one_of_many=True) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes the same Ctrl-C on
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
