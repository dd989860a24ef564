"""MOSAIC training: roll out, judge, advantage, pack, update, sync, log.

python -m mosaic_fast.train [run.toml] [--options]      --dry-run prints the memory it will take, and ends
torchrun --nproc-per-node N -m mosaic_fast.train [run.toml] [--options]    the same on several ranks
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a mistake are answered before torch is imported
    from mosaic_fast.cli import check_train_arguments

    check_train_arguments()

import sys
from contextlib import nullcontext

from transformers.utils.logging import disable_progress_bar

from mosaic_fast import make_callable
from mosaic_fast.cli import run_cli
from mosaic_fast.config import EVALUATION_ONLY, Config
from mosaic_fast.config.config import derived_seed
from mosaic_fast.config.read import parse_train_command
from mosaic_fast.distributed import ALONE, World
from mosaic_fast.distributed.exchange import Share, all_groups
from mosaic_fast.distributed.world import run_as_rank
from mosaic_fast.errors import EngineStoppedError, UserError
from mosaic_fast.learner.step_batch import step_batch
from mosaic_fast.preferences import judgement_figures
from mosaic_fast.run.findings import no_signal, rollout_findings, update_findings
from mosaic_fast.run.folder import RunFolder
from mosaic_fast.run.interrupt import Clock, Interrupt, Stopped
from mosaic_fast.run.judge_groups import judge_groups
from mosaic_fast.run.metrics import mean_staleness, prefix_hit, reward_figures, rollout_figures
from mosaic_fast.setup.async_rollouts import AsyncRollouts
from mosaic_fast.setup.attacker import AttackCounts, build_attacker
from mosaic_fast.setup.build import GroupPlan
from mosaic_fast.setup.given import NOTHING, Given
from mosaic_fast.setup.memory import dry_run
from mosaic_fast.setup.ready import ReadyRun, ready_run
from mosaic_fast.training import Trained, Training
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
    if config.sft.is_set or config.loss.name == "sft":
        raise UserError("[sft] and loss.name = 'sft' are a cold start: run it by python -m mosaic_fast.sft")
    with interrupt.abandonable() if world.size == 1 else nullcontext():
        run = ready_run(folder, folder.dated(config), world, interrupt, given)
    return _Trainer(run, interrupt).run(run.notes)


class _Trainer(Training):
    """MOSAIC's step: roll out, judge, advantage, pack, update."""

    command = "mosaic_fast.train"

    def __init__(self, run: ReadyRun, interrupt: Interrupt) -> None:
        super().__init__(run, interrupt)
        self.attacker = build_attacker(self.config, self.setup.loop.environment)
        ahead = self.config.rollout.max_staleness
        self.rollouts = AsyncRollouts(
            self.setup.publish if ahead else lambda version: None,
            lambda step: self._play(step, version=None if ahead else step),
            max_staleness=ahead,
            steps=self.config.steps,
            abandon=self.setup.abandon,
            abandonable=interrupt.abandonable,
        )

    def settle(self) -> None:
        self.rollouts.wait()

    def close(self) -> None:
        self.rollouts.close()

    def _tasks(self, step: int) -> list[Task]:
        seed = derived_seed(self.config.seed, "tasks", step)
        tasks = self.setup.loop.environment.sample("train", self.config.rollout.prompts_per_step, seed)
        return self.attacker.attacked(tasks, step, self._attack_counts()) if self.attacker else tasks

    def _attack_counts(self) -> AttackCounts:
        return AttackCounts.of_json(self.progress.attacks)

    def _play(self, step: int, *, version: int | None) -> Share:
        """A group of trajectories for each of this rank's tasks of a step."""
        config = self.config.rollout
        seed = derived_seed(self.config.seed, "draws", step)
        plan = GroupPlan(config.group_size, seed, config.branching, config.gate_contrast)
        return self.setup.play(self.setup.loop, self._tasks(step), plan, version=version)

    def train(self, step: int) -> Trained:
        """A training step; the engine takes its weights as it is asked for the next step's rollouts."""
        config = self.config
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
        found = rollout_findings(groups, judged.advantages, config, self.setup.loop.limits, step)
        if config.reward.require_signal and not any(a.any() for a in judged.advantages):
            raise no_signal(step, found)
        clock.lap("time/judge_s")

        # pack, update
        batch = step_batch(groups, judged.preferences, judged.totals, judged.advantages)
        figures, forest = self.learner.update(batch, step), batch.forest
        found += update_findings(figures, int(forest.trained.sum()), config, step)
        if config.reward.require_signal and not figures["optim/grad_norm"] > 0.0:
            raise no_signal(step, found)
        clock.lap("time/update_s")

        figures = {
            **rollout_figures(rollouts),
            "policy/staleness": mean_staleness(rollouts, step),
            **(reward_figures(judged.rewards) if judged.rewards else {}),
            **judgement_figures(judged.judgements),
            **figures,
            **prefix_hit(rollouts, forest),
            "perf/generated_tokens_per_s": forest.trained.sum() / clock.laps["time/rollout_s"],
            "perf/update_tokens_per_s": forest.num_tokens * config.optim.epochs / clock.laps["time/update_s"],
        }
        attacks: dict[str, object] = {}
        if self.attacker is not None:
            figures |= self.attacker.figures(groups)
            attacks = self.attacker.observed(self._attack_counts(), step, groups).as_json()
        return Trained(figures, found, clock, attacks)

    def _take(self, step: int) -> Share:
        """This rank's rollouts of a step; an abandoned share where it was asked to stop while it waited."""
        try:
            return self.rollouts.take(step)
        except Stopped:
            return Share(abandoned=True)


make_callable(__name__)

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
