"""The cold start: supervised learning on conversations and demonstrations, in turns of plan, check and act.

python -m mosaic_fast.sft RUN.toml [--options]      RUN.toml has a section [sft]; --resume goes on with a run
torchrun --nproc-per-node N -m mosaic_fast.sft RUN.toml [--options]

What it leaves is a run folder like that of training, and `python -m mosaic_fast.train` goes on from it
(--model.path RUN_FOLDER), with it as the reference policy.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a mistake are answered before torch is imported
    from mosaic_fast.cli import check_train_arguments

    check_train_arguments("mosaic_fast.sft")

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

import numpy as np
from transformers.utils.logging import disable_progress_bar

from mosaic_fast.cli import run_cli
from mosaic_fast.config import EVALUATION_ONLY, Config
from mosaic_fast.config.config import derived_seed
from mosaic_fast.config.read import parse_train_command
from mosaic_fast.distributed import ALONE, World
from mosaic_fast.distributed.world import run_as_rank
from mosaic_fast.errors import UserError
from mosaic_fast.learner.step_batch import StepBatch, step_batch
from mosaic_fast.run.findings import update_findings
from mosaic_fast.run.folder import RunFolder
from mosaic_fast.run.interrupt import Clock, Interrupt
from mosaic_fast.run.metrics import Rate, rollout_figures
from mosaic_fast.run.progress import ProgressView
from mosaic_fast.run.trajectories import rollout_row, write_rows
from mosaic_fast.setup.given import NOTHING
from mosaic_fast.setup.memory import dry_run
from mosaic_fast.setup.ready import ReadyRun, ready_run
from mosaic_fast.training import Trained, Training
from mosaic_rollout.types import Rollout


def main() -> int:
    disable_progress_bar()  # transformers' own bars would be drawn across the table
    return run_as_rank(_main)


def _main(world: World) -> int:
    command = parse_train_command(sys.argv[1:], "mosaic_fast.sft")
    if command.dry_run:
        return dry_run(command.config) if world.is_first else 0
    return sft(command.config, command.name, resume=command.resume, world=world)


def sft(config: Config, name: str = "sft", *, resume: bool = False, world: World = ALONE) -> int:
    """Run the cold start that `config` describes, from its last checkpoint if `resume`.

    Returns the exit code. Raises UserError for what a user can mend. Every rank of `world` calls it.
    """
    if not config.sft.is_set:
        raise UserError("there is nothing to learn from: set sft.conversations or sft.demonstrations")
    if config.env.name in EVALUATION_ONLY and config.sft.demonstrations:
        raise UserError(f"env.name: {config.env.name} is for evaluation only and is not trained on")
    with (
        Interrupt(one_of_many=world.size > 1) as interrupt,
        RunFolder(config, name, resume=resume, world=world) as folder,
    ):
        with interrupt.abandonable() if world.size == 1 else nullcontext():
            run = ready_run(folder, folder.dated(config), world, interrupt, NOTHING)
        return _Supervised(run, interrupt).run(run.notes)


class _Supervised(Training):
    """A step: the next conversations of a random order that is another one in every pass, and an update."""

    command = "mosaic_fast.sft"

    def __init__(self, run: ReadyRun, interrupt: Interrupt) -> None:
        super().__init__(run, interrupt)
        self._demonstrations = run.demonstrations.rollouts
        heldout = run.demonstrations.heldout
        self._heldout_batch = _batch_of(heldout) if heldout else None
        self._order = lru_cache(maxsize=2)(self._order_anew)

    def train(self, step: int) -> Trained:
        """One forest of the step's conversations, and one update on it."""
        config, clock = self.config, Clock()
        rollouts = self._rollouts(step)
        if self.world.is_first:
            with self.folder.writing("the trajectories"):
                write_rows(self.folder.trajectory_path(step + 1), map(rollout_row, rollouts))
        batch, apart = _batch_of(rollouts), self._heldout_batch
        heldout: dict[str, float] = {}
        if apart is not None and step == 0:
            heldout["heldout/nll_before"] = self.learner.nats_a_token(apart)
        updated, forest = self.learner.update(batch, step), batch.forest
        figures = {name: value for name, value in updated.items() if not name.startswith("mismatch/")}
        found = update_findings(figures, int(forest.trained.sum()), config)
        clock.lap("time/update_s")
        every = config.env.eval_every or config.steps
        if apart is not None and (step + 1 == config.steps or (step + 1) % every == 0):
            heldout["heldout/nll"] = self.learner.nats_a_token(apart)
        of_rollouts = rollout_figures(rollouts)
        figures = {
            **{name: value for name, value in of_rollouts.items() if name.startswith("rollout/")},
            **figures,
            **heldout,
            "sft/passes": (step + 1) * config.sft.per_step / len(self._demonstrations),
            "perf/update_tokens_per_s": forest.num_tokens * config.optim.epochs / clock.laps["time/update_s"],
        }
        return Trained(figures, found, clock)

    def finish(self, after: dict[str, Rate], view: ProgressView) -> None:
        super().finish(after, view)
        if not self.world.is_first:
            return
        rows = self.folder.metrics()
        before = [row["heldout/nll_before"] for row in rows if "heldout/nll_before" in row]
        last = [row["heldout/nll"] for row in rows if "heldout/nll" in row]
        if before and last:
            view.say(f"held-out      {before[0]:.3f} nats a trained token before, {last[-1]:.3f} after")
        if not self.unfinished:
            view.say(f"then          python -m mosaic_fast.train --model.path {self.folder.path}")

    def _rollouts(self, step: int) -> list[Rollout]:
        """The conversations of a step, a function of the seed and the step alone."""
        count, size = len(self._demonstrations), self.config.sft.per_step
        places = [divmod(step * size + i, count) for i in range(size)]
        chosen = [self._demonstrations[self._order(done)[place]] for done, place in places]
        return [replace(rollout, rollout_id=i, group_id=i) for i, rollout in enumerate(chosen)]

    def _order_anew(self, done: int) -> Sequence[int]:
        """The order of all conversations after so many passes over them."""
        seed = derived_seed(self.config.seed, "conversations", done)
        return np.random.default_rng(seed).permutation(len(self._demonstrations)).tolist()


def _batch_of(rollouts: Sequence[Rollout]) -> StepBatch:
    """Demonstrations as a batch in which each counts alike, and none is compared with another."""
    nobody, ones = [np.full((1, 1), 0.5)] * len(rollouts), [np.ones(1)] * len(rollouts)
    return step_batch([[rollout] for rollout in rollouts], nobody, ones, ones)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
