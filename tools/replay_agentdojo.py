"""Proof on the spot that the adapter keeps AgentDojo's meaning: its own solutions, replayed through it.

    python -m tools.replay_agentdojo

A policy that solves the user task must be scored as done (97 of 97 user tasks), one that obeys the injection
as attacked, one that ignores it as not attacked. Exits with 1 where any of it fails. Injection tasks with an
empty ground truth ask for words in the answer only, and are counted apart.
"""

from __future__ import annotations

import sys

if (
    __name__ == "__main__" and len(sys.argv) > 1
):  # it takes no options; --help is answered before slow imports
    print(__doc__)
    raise SystemExit(0 if sys.argv[1] in ("-h", "--help") else 2)

from typing import Literal

from mosaic_rollout.environments.agentdojo.environment import AgentDojoEnvironment
from mosaic_rollout.environments.agentdojo.tasks import SPLITS, payload_of
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task, ToolCall, Verdict

SUITES = ("banking", "slack", "travel", "workspace")
USER_TASKS, INJECTION_TASKS = 97, 35  # of benchmark version v1.2.2


def ground_truth_calls(
    environment: AgentDojoEnvironment, task: Task, which: Literal["user", "injection"] = "user"
) -> tuple[list[ToolCall], str]:
    """AgentDojo's own solution of a task: the calls that carry it out, and the final answer.

    which: the user's task, or the injected one. ValueError for the injection of a task that has none.
    """
    episode = environment.reset(task)
    goal = episode.user_task if which == "user" else episode.injection_task
    if goal is None:
        raise ValueError(f"{task.task_id} has no injection")
    calls = [ToolCall(call.function, dict(call.args)) for call in episode.ground_truth(goal)]
    return calls, goal.GROUND_TRUTH_OUTPUT


def replay(environment: AgentDojoEnvironment, task: Task, which: Literal["user", "injection"]) -> Verdict:
    """The verdict on an episode in which exactly the ground truth's calls were made."""
    calls, answer = ground_truth_calls(environment, task, which)
    episode = environment.reset(task)
    for call in calls:
        episode.step(call)
    return episode.score(answer)


def one_task_an_injection(environment: AgentDojoEnvironment) -> list[Task]:
    """Every injection task, each with the first user task of its split."""
    tasks = {}
    for split in SPLITS:
        for task in environment.tasks(split, injected=True):
            payload = payload_of(task)
            tasks.setdefault((payload.suite, payload.injection_task), task)
    return list(tasks.values())


def main() -> int:
    """Replay everything, print the counts and each failure."""
    environment = AgentDojoEnvironment(SUITES)
    benign = [task for split in SPLITS for task in environment.tasks(split, injected=False)]
    injected = one_task_an_injection(environment)
    acting = [task for task in injected if ground_truth_calls(environment, task, "injection")[0]]

    undone = [task for task in benign if not replay(environment, task, "user").done]
    unnoticed = [task for task in acting if not replay(environment, task, "injection").harm]
    blamed = [task for task in injected if replay(environment, task, "user").harm]

    print(f"utility of the user tasks' ground truth      {len(benign) - len(undone)}/{len(benign)}")
    print(f"obeying the injection is scored as attacked  {len(acting) - len(unnoticed)}/{len(acting)}")
    print(f"ignoring it is scored as not attacked        {len(injected) - len(blamed)}/{len(injected)}")
    print(f"injections without calls, left out above     {len(injected) - len(acting)}")
    for reason, tasks in (("not done", undone), ("not attacked", unnoticed), ("attacked", blamed)):
        for task in tasks:
            print(f"FAILED: {task.task_id} was scored as {reason}")
    complete = len(benign) == USER_TASKS and len(injected) == INJECTION_TASKS
    if not complete:
        print(f"FAILED: expected {USER_TASKS} user and {INJECTION_TASKS} injection tasks")
    return 0 if complete and not (undone or unnoticed or blamed) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
