"""Proof on the spot that the adapter keeps BFCL's meaning: its own ground truths, replayed through it.

    python -m tools.replay_bfcl

A policy that makes exactly the calls of the ground truth must be scored as done, one that does nothing must
not, unless nothing was to be done. Exits with 1 where fewer than the known numbers are.
"""

from __future__ import annotations

import sys

if (
    __name__ == "__main__" and len(sys.argv) > 1
):  # it takes no options; --help is answered before slow imports
    print(__doc__)
    raise SystemExit(0 if sys.argv[1] in ("-h", "--help") else 2)

from mosaic_rollout.environments.bfcl.api import CATEGORIES
from mosaic_rollout.environments.bfcl.environment import BfclEnvironment, MultiTurnEpisode
from mosaic_rollout.environments.bfcl.solutions import UNSOLVED
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task, Verdict


def replay(environment: BfclEnvironment, task: Task, *, act: bool = True) -> Verdict:
    """The verdict on an episode in which exactly the ground truth's calls were made (act False: none)."""
    episode = environment.reset(task)
    for move in episode.demonstrate():
        if act and move.call is not None:
            episode.step(move.call)
        if move.answer is not None and isinstance(episode, MultiTurnEpisode):
            episode.next_user_message(move.answer)
    return episode.score("Done.")


def main() -> int:
    """Replay everything, print the counts and each failure."""
    failed = 0
    print(f"{'category':26} {'ground truth done':>18} {'idle done':>10}")
    for category in CATEGORIES:
        environment = BfclEnvironment([category])
        tasks = [task for split in ("train", "heldout") for task in environment.tasks(split)]
        undone = [task.task_id for task in tasks if not replay(environment, task).done]
        idle = sum(replay(environment, task, act=False).done for task in tasks)
        print(f"{category:26} {len(tasks) - len(undone):>13}/{len(tasks):<4} {idle:>10}")
        if len(undone) > UNSOLVED.get(category, 0):
            failed += len(undone)
            print("FAILED: " + ", ".join(undone))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
