"""MOSAIC training: roll out, judge, advantage, pack, update, sync, log.

python -m mosaic_fast.train [run.toml] [--options]      --dry-run prints the memory it will take, and ends
torchrun --nproc-per-node N -m mosaic_fast.train [run.toml] [--options]    the same on several ranks
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a mistake are answered before torch is imported
    from mosaic_fast.cli import check_train_arguments

    check_train_arguments()

import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from mosaic_fast import make_callable
from mosaic_fast.cli import run_cli
from mosaic_fast.config import EVALUATION_ONLY, Config
from mosaic_fast.config.config import derived_seed
from mosaic_fast.config.kinds import RECORD, record_of
from mosaic_fast.config.read import parse_train_command
from mosaic_fast.distributed import ALONE, World
from mosaic_fast.distributed.exchange import Share, all_groups
from mosaic_fast.distributed.world import INTERRUPTED, run_as_rank
from mosaic_fast.errors import EngineStoppedError, UserError
from mosaic_fast.evaluate import evaluate_policy, evaluation_tasks, rates_table
from mosaic_fast.learner.checkpoint import Progress, checkpoint_path, latest_checkpoint, save_checkpoint
from mosaic_fast.learner.step_batch import step_batch
from mosaic_fast.preferences import judge_record, judgement_figures
from mosaic_fast.run.findings import Findings, no_signal, rollout_findings, update_findings
from mosaic_fast.run.folder import RunFolder
from mosaic_fast.run.interrupt import Clock, Interrupt, Stopped
from mosaic_fast.run.judge_groups import judge_groups
from mosaic_fast.run.metrics import (
    Rate,
    mean_staleness,
    pairs_of,
    prefix_hit,
    reward_figures,
    rollout_figures,
)
from mosaic_fast.run.progress import ProgressView
from mosaic_fast.run.summary import closing_lines, write_summary
from mosaic_fast.run.trackers import Trackers
from mosaic_fast.setup.async_rollouts import AsyncRollouts
from mosaic_fast.setup.build import GroupPlan
from mosaic_fast.setup.given import NOTHING, Given
from mosaic_fast.setup.memory import dry_run
from mosaic_fast.setup.model_folder import check_tokenizer
from mosaic_fast.setup.ready import ReadyRun, ready_run
from mosaic_rollout.types import Task


def main() -> int:
    disable_progress_bar()  # transformers' own bars would be drawn across the table
    return run_as_rank(_main)


def _main(world: World) -> int:
    command = parse_train_command(sys.argv[1:])
    if command.dry_run:
        return dry_run(command.config) if world.is_first else 0
    return train(command.config, command.name, resume=command.resume, world=world)


def train(config: Config, name: str = "world", *, resume: bool = False, world: World = ALONE) -> int:
    """Run the training that `config` describes, from its last checkpoint if `resume`; returns the exit code.

    This is the command's; `mosaic_fast.train` takes objects as well and returns the run. Raises UserError
    for what a user can mend, and nothing of the run on disk is lost then. Every rank of `world` calls it;
    the first one writes all files, and reads what the others need to agree on.
    """
    with (
        Interrupt(one_of_many=world.size > 1) as interrupt,
        RunFolder(config, name, resume=resume, world=world) as folder,
    ):
        return train_in(folder, config, interrupt, world=world)


def train_in(
    folder: RunFolder, config: Config, interrupt: Interrupt, *, world: World = ALONE, given: Given = NOTHING
) -> int:
    """`train` in a run folder that is open, with objects in place of what the configuration names."""
    if config.env.name in EVALUATION_ONLY:
        raise UserError(
            f"env.name: {config.env.name} is for evaluation only and is not trained on; play it with "
            f"python -m mosaic_fast.evaluate MODEL --suite {config.env.name}={config.env.tasks}"
        )
    with interrupt.abandonable() if world.size == 1 else nullcontext():
        run = ready_run(folder, folder.dated(config), world, interrupt, given)
    return _train(_Trainer(run, interrupt), run.notes, interrupt)


def _train(trainer: _Trainer, notes: Sequence[str], interrupt: Interrupt) -> int:
    """The run from where it stands to its end, or until it is asked to stop; returns the exit code."""
    config, folder, world = trainer.config, trainer.folder, trainer.world
    after: dict[str, Rate] = {}
    stop = False
    with (
        closing(trainer.setup.engine),
        closing(trainer.rollouts),
        ProgressView(
            config.trackers.console if world.is_first else "quiet", config.steps, trainer.progress.step
        ) as view,
        Trackers(config, folder.path, active=world.is_first) as trackers,
    ):
        view.say(f"run folder {folder.path}")
        if world.size > 1:
            view.say(f"{world.size} ranks")
        for note in notes:
            view.say(note)
        try:
            if not trainer.progress.before and config.env.eval_tasks:
                view.say(f"evaluating the start on {trainer.heldout_words}, greedy")
                if trainer.evaluate_start()["rollout/truncated_frac"].value == 1.0:
                    view.say(
                        "every one of these episodes was cut off by a limit: raise rollout.max_step_tokens, "
                        "rollout.max_rollout_tokens or rollout.max_steps"
                    )
            while trainer.unfinished and not (stop := trainer.any_rank(interrupt.requested)):
                row, said = trainer.step()
                view.step(row, said)
                trackers.log(row)
            if config.env.eval_tasks and not (stop := stop or trainer.any_rank(interrupt.requested)):
                view.say(f"evaluating the result on {trainer.heldout_words}, greedy")
                after = trainer.evaluate(config.env.eval_tasks, trainer.progress.step)
        except Stopped:
            stop = True
    trainer.finish(after, view)
    return INTERRUPTED if stop else 0


class _Trainer:
    """The parts of a run that its steps share."""

    def __init__(self, run: ReadyRun, interrupt: Interrupt) -> None:
        config, setup = run.config, run.setup
        self.config, self.folder, self.setup = config, run.folder, setup
        self.learner, self.judge, self.world = run.learner, run.judge, setup.world
        self.progress, self._interrupt = run.progress, interrupt
        self._opened_one = False  # a checkpoint of this process was opened again
        self._checkpoint_s = 0.0  # seconds the last checkpoint took
        self._findings = Findings()
        ahead = config.rollout.max_staleness
        self.rollouts = AsyncRollouts(
            setup.publish if ahead else lambda version: None,
            lambda step: self._play(step, version=None if ahead else step),
            max_staleness=ahead,
            steps=config.steps,
            abandon=setup.abandon,
            abandonable=interrupt.abandonable,
        )

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

    def _tasks(self, step: int) -> list[Task]:
        seed = derived_seed(self.config.seed, "tasks", step)
        return self.setup.loop.environment.sample("train", self.config.rollout.prompts_per_step, seed)

    def _play(self, step: int, *, version: int | None) -> Share:
        """A group of trajectories for each of this rank's tasks of a step."""
        config = self.config.rollout
        seed = derived_seed(self.config.seed, "draws", step)
        plan = GroupPlan(config.group_size, seed, config.branching, config.gate_contrast)
        return self.setup.play(self.setup.loop, self._tasks(step), plan, version=version)

    def step(self) -> tuple[dict[str, float], list[str]]:
        """Run a step, or the evaluation that was cut off after the last one: metrics, and notes to show."""
        if self.progress.unevaluated:
            return self._evaluated(self.progress.unevaluated), []
        config, step = self.config, self.progress.step
        clock = Clock()

        # roll out: a group of trajectories for every task, by the current weights unless sampled ahead
        try:
            groups = all_groups(self.world, self._take(step), self._tasks(step))
        except EngineStoppedError:
            self.save_unsaved()
            raise
        rollouts = [rollout for group in groups for rollout in group]
        clock.lap("time/rollout_s")

        # judge, advantage; the trajectories are written
        judged = judge_groups(
            self.judge, groups, config.reward, self.folder, step, self.world, self._interrupt
        )
        found = rollout_findings(groups, judged.advantages, config, self.setup.loop.limits)
        if config.reward.require_signal and not any(a.any() for a in judged.advantages):
            raise no_signal(step, found)
        clock.lap("time/judge_s")

        # pack, update
        batch = step_batch(groups, judged.preferences, judged.totals, judged.advantages)
        figures, forest = self.learner.update(batch, step), batch.forest
        found += update_findings(figures, int(forest.trained.sum()), config)
        if config.reward.require_signal and not figures["optim/grad_norm"] > 0.0:
            raise no_signal(step, found)
        clock.lap("time/update_s")

        # sync and log: the engine takes the new weights as it is asked for the next step's rollouts
        row = {
            "step": step + 1.0,
            **rollout_figures(rollouts),
            "policy/staleness": mean_staleness(rollouts, step),
            **(reward_figures(judged.rewards) if judged.rewards else {}),
            **judgement_figures(judged.judgements),
            **figures,
            **prefix_hit(rollouts, forest),
            **clock.laps,
            "time/checkpoint_s": self._checkpoint_s,
            "time/step_s": clock.total + self._checkpoint_s,
            "perf/generated_tokens_per_s": forest.trained.sum() / clock.laps["time/rollout_s"],
            "perf/update_tokens_per_s": forest.num_tokens * config.optim.epochs / clock.laps["time/update_s"],
        }
        seconds = self.progress.train_s + row["time/step_s"]
        self.progress = replace(self.progress, step=step + 1, train_s=seconds)
        notes, known = self._findings.to_say(step + 1, found)
        if self.world.is_first:
            self.folder.append_notes(step + 1, notes)
        still = [f"still: {', '.join(known)}"] if known else []
        return self._evaluated(row), [*notes, *still]

    def _take(self, step: int) -> Share:
        """This rank's rollouts of a step; an abandoned share where it was asked to stop while it waited."""
        try:
            return self.rollouts.take(step)
        except Stopped:
            return Share(abandoned=True)

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
            self.rollouts.wait()
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
        for line in closing_lines(folder, self.progress, complete=complete):
            view.say(line)


make_callable(__name__)

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
