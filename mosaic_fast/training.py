"""What every way of training shares: steps, evaluations before and after them, checkpoints, and the end.

`train.py` (MOSAIC) and `sft.py` (supervised learning) say what a step is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

from mosaic_fast.config.kinds import RECORD, record_of
from mosaic_fast.distributed.world import INTERRUPTED
from mosaic_fast.errors import EngineStoppedError
from mosaic_fast.evaluate import evaluate_policy, evaluation_tasks, rates_table
from mosaic_fast.learner.checkpoint import Progress, checkpoint_path, latest_checkpoint, save_checkpoint
from mosaic_fast.preferences import judge_record
from mosaic_fast.run.findings import Finding, Findings
from mosaic_fast.run.interrupt import Clock, Interrupt, Stopped
from mosaic_fast.run.metrics import Rate, pairs_of
from mosaic_fast.run.progress import ProgressView
from mosaic_fast.run.summary import closing_lines, write_summary
from mosaic_fast.run.trackers import Trackers
from mosaic_fast.setup.model_folder import check_tokenizer
from mosaic_fast.setup.ready import ReadyRun


@dataclass(frozen=True)
class Trained:
    """What one training step gave."""

    figures: dict[str, float]  # metrics by name
    found: Sequence[Finding]
    clock: Clock  # of its parts
    attacks: dict[str, object] = field(default_factory=dict)  # what is known of attacks after it


class Training(ABC):
    """A run and its parts, from where it stands to its end."""

    command: ClassVar[str]
    """The module that goes on with such a run."""

    def __init__(self, run: ReadyRun, interrupt: Interrupt) -> None:
        config, setup = run.config, run.setup
        self.config, self.folder, self.setup = config, run.folder, setup
        self.learner, self.judge, self.world = run.learner, run.judge, setup.world
        self.progress, self._interrupt = run.progress, interrupt
        self._opened_one = False  # a checkpoint of this process was opened again
        self._checkpoint_s = 0.0  # seconds the last checkpoint took
        self._findings = Findings()

    @abstractmethod
    def train(self, step: int) -> Trained:
        """Train on what belongs to a step; `step` were done before."""

    def settle(self) -> None:  # noqa: B027  most have nothing
        """Wait for what runs beside training. Stopped where it is abandoned instead."""

    def close(self) -> None:  # noqa: B027
        """End what runs beside training."""

    def run(self, notes: Sequence[str]) -> int:
        """The run from where it stands to its end, or until it is asked to stop; returns the exit code."""
        config, folder, world = self.config, self.folder, self.world
        after: dict[str, Rate] = {}
        stop = False
        console = config.trackers.console if world.is_first else "quiet"
        with (
            closing(self.setup.engine),
            closing(self),
            ProgressView(console, config.steps, self.progress.step) as view,
            Trackers(config, folder.path, active=world.is_first) as trackers,
        ):
            view.say(f"run folder {folder.path}")
            if world.size > 1:
                view.say(f"{world.size} ranks")
            for note in notes:
                view.say(note)
            try:
                if not self.progress.before and config.env.eval_tasks:
                    view.say(f"evaluating the start on {self.heldout_words}, greedy")
                    if self.evaluate_start()["rollout/truncated_frac"].value == 1.0:
                        view.say(
                            "every one of these episodes was cut off by a limit: raise "
                            "rollout.max_step_tokens, rollout.max_rollout_tokens or rollout.max_steps"
                        )
                while self.unfinished and not (stop := self.any_rank(self._interrupt.requested)):
                    row, said = self.step()
                    view.step(row, said)
                    trackers.log(row)
                if config.env.eval_tasks and not (stop := stop or self.any_rank(self._interrupt.requested)):
                    view.say(f"evaluating the result on {self.heldout_words}, greedy")
                    after = self.evaluate(config.env.eval_tasks, self.progress.step)
            except Stopped:
                stop = True
        self.finish(after, view)
        return INTERRUPTED if stop else 0

    @property
    def unfinished(self) -> bool:
        """Whether steps are left, or the metrics of the last one."""
        return self.progress.step < self.config.steps or bool(self.progress.unevaluated)

    @cached_property
    def heldout_tasks(self) -> int:
        """How many tasks the evaluation before or after training plays: all, where there are fewer."""
        return self._heldout(self.config.env.eval_tasks)

    @property
    def heldout_words(self) -> str:
        """The number of held-out tasks in words, with a note where there are fewer than were asked for."""
        asked, found = self.config.env.eval_tasks, self.heldout_tasks
        return f"{found} held-out tasks" + (f" (all there are of {asked})" if found < asked else "")

    def _heldout(self, count: int) -> int:
        return len(evaluation_tasks(self.setup.loop.environment, "heldout", count)) if count else 0

    def any_rank(self, here: bool) -> bool:
        """Whether `here` is true on at least one rank. Every rank has to call it."""
        return bool(self.world.maximum(int(here)))

    def step(self) -> tuple[dict[str, float], list[str]]:
        """Run a step, or the evaluation that was cut off after the last one: metrics, and notes to show."""
        if self.progress.unevaluated:
            return self._evaluated(self.progress.unevaluated), []
        step = self.progress.step
        trained = self.train(step)
        clock = trained.clock
        row = {
            "step": step + 1.0,
            **trained.figures,
            **clock.laps,
            "time/checkpoint_s": self._checkpoint_s,
            "time/step_s": clock.total + self._checkpoint_s,
        }
        seconds = self.progress.train_s + row["time/step_s"]
        self.progress = replace(self.progress, step=step + 1, train_s=seconds, attacks=trained.attacks)
        notes, known = self._findings.to_say(step + 1, trained.found)
        if self.world.is_first:
            self.folder.append_notes(step + 1, notes)
        still = [f"still: {', '.join(known)}"] if known else []
        return self._evaluated(row), [*notes, *still]

    def _evaluated(self, row: dict[str, float]) -> dict[str, float]:
        """Evaluate after the step just done where due, write its metrics, and save a checkpoint where due.

        Where the evaluation ends early, a checkpoint keeps the step, whose metrics are then written once
        it was made.
        """
        config, step = self.config, self.progress.step
        if config.env.eval_every and step % config.env.eval_every == 0:
            try:
                count = max(1, config.env.eval_tasks // 3)
                rates = self.evaluate(count, step)
            except (EngineStoppedError, Stopped):
                self.progress = replace(self.progress, unevaluated=dict(row))
                self.save_unsaved()
                raise
            row |= {f"heldout/{name}": rate.value for name, rate in rates.items() if rate.total}
            row["heldout/tasks"] = float(self._heldout(count))
        self.progress = replace(self.progress, unevaluated={})
        if self.world.is_first:
            self.folder.append_metrics(row)
        if step % config.checkpoint.every == 0 or step == config.steps:
            self.save_unsaved()
        return row

    def save_unsaved(self) -> None:
        """A checkpoint of where the run stands, if there is none yet and anything was done."""
        folder = self.folder.checkpoints
        missing = (
            self.world.is_first
            and self.progress != Progress()
            and latest_checkpoint(folder) != checkpoint_path(folder, self.progress)
        )
        if self.any_rank(missing):
            self._save()

    def _save(self) -> None:
        clock = Clock()
        if self.world.is_first:
            self.folder.settle()  # what the checkpoint counts on is on disk before it
        tokenizer, optimizer, keep = self.setup.tokenizer, self.learner.optimizer, self.config.checkpoint.keep
        check = None if self._opened_one else partial(check_tokenizer, tokenizer)
        folder, progress = self.folder.checkpoints, self.progress
        save_checkpoint(folder, self._save_model, tokenizer, optimizer, progress, keep, self.world, check)
        self._opened_one = True
        self._checkpoint_s = clock.total

    def _save_model(self, folder: Path | None) -> None:
        """Write the model's folder, and beside it the settings that a later run of this model should keep."""
        self.setup.save_weights(folder, check=not self._opened_one)
        if folder is not None:
            (folder / RECORD).write_text(record_of(self.config), encoding="utf-8")

    def evaluate_start(self) -> dict[str, Rate]:
        """The evaluation before training."""
        before = self.evaluate(self.config.env.eval_tasks, self.progress.step)
        self.progress = replace(self.progress, before=pairs_of(before))
        return before

    def evaluate(self, count: int, step: int) -> dict[str, Rate]:
        """Rates on held-out tasks, greedy, by the weights after `step` training steps."""
        abandoned = False
        try:
            self.settle()
        except Stopped:
            abandoned = True
        if self.any_rank(abandoned):
            raise Stopped
        return evaluate_policy(self.setup, "heldout", count, temperature=0.0, version=step)

    def finish(self, after: dict[str, Rate], view: ProgressView) -> None:
        """A last checkpoint where one is missing; summary, curves and the closing table."""
        before = {name: Rate(*pair) for name, pair in self.progress.before.items()}
        complete = not self.unfinished and bool(after or not self.config.env.eval_tasks)
        self.save_unsaved()
        if not self.world.is_first:
            return
        folder, seed, tasks = self.folder, self.config.seed, self.heldout_tasks
        judge = judge_record(self.judge)
        write_summary(folder, self.progress, before, after, seed, tasks, judge, complete=complete)
        if before or after:
            columns = {name: rates for name, rates in (("before", before), ("after", after)) if rates}
            view.console.print(rates_table(columns, f"held-out, greedy, {tasks} tasks"))
        for line in closing_lines(folder, self.progress, self.command, complete=complete):
            view.say(line)
