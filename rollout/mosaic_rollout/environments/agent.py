"""An agent that is a program of its own: `env.name = "agent:module:function"`.

    def function(task: dict, base_url: str, api_key: str) -> float | dict: ...    # may be async

It is given a task and an endpoint of OpenAI's protocol, where the model `policy` answers; it runs whatever it
runs, its own tools as well, and returns a score, or the dict of a verdict. The server behind the endpoint
(mosaic_rollout/serving) knows what was asked and sampled, so nothing of the program has to be changed.
"""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import NoReturn

from mosaic_rollout.environments.custom.rows import Row, RowTasks
from mosaic_rollout.environments.sources import payload_as
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.checks import dict_verdict, reward_verdict
from mosaic_rollout.foreign.code import import_named, in_thread, show_first
from mosaic_rollout.types import Task, Verdict

PREFIX = "agent:"
MODEL = "policy"
"""The name of the model at the endpoint."""
ERRORS = "agent_errors"
"""Detail of a verdict: 1 where the program raised, after the policy had been asked something."""
_FAILED = Verdict(harm=False, done=False, progress=0.0, details={ERRORS: 1.0})


class AgentEnvironment:
    """Rows of tasks, each played by a call of the user's function, in a thread of its own.

    timeout_s: how long an episode may take. UserError where there is no such function or no tasks.
    """

    def __init__(self, name: str, tasks: Path, heldout_tasks: Path | None, *, timeout_s: float) -> None:
        spec = name.removeprefix(PREFIX)
        self.name, self._timeout_s = name, timeout_s
        self._function = import_named(spec, "env.name")
        self._code = ForeignCode(f"env.name {name!r}")
        self._rows = RowTasks(tasks, heldout_tasks)
        self._shown = False

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, a pure function of its arguments; a task repeats only once all have been drawn."""
        return self._rows.sample(split, count, seed)

    def reset(self, task: Task) -> NoReturn:
        """There are no steps to play one by one: the program has its own loop."""
        raise UserError(
            f"env.name {self.name!r} is a program with a loop of its own: it is trained on, and evaluated "
            "with a model or run folder, not with an endpoint, and has no demonstrations"
        )

    async def run(self, task: Task, base_url: str, api_key: str) -> Verdict | None:
        """The verdict of one episode; None where it did not end in time, and goes on.

        What the function raises is the episode's failure. UserError where what it returns is no verdict.
        """
        row = payload_as(task, Row, self.name)
        given = copy.deepcopy(
            {
                **row.columns,
                "prompt": row.messages[-1]["content"],
                "messages": list(row.messages),
                "kind": row.kind,
            }
        )
        work = in_thread(
            lambda: self._code.run(self._function, given, base_url, api_key), f"agent {task.task_id}"
        )
        done, _ = await asyncio.wait({work}, timeout=self._timeout_s)
        if not done:
            work.add_done_callback(lambda late: late.cancelled() or late.exception())
            return None
        try:
            found = work.result()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  a program may raise anything
            self._report(error)
            return _FAILED
        verdict = dict_verdict(found, self.name) if isinstance(found, dict) else None
        verdict = verdict or reward_verdict(found, f"what {self.name} returned")
        return Verdict(verdict.harm, verdict.done, verdict.progress, {ERRORS: 0.0, **verdict.details})

    def never_asked(self, task: Task) -> UserError:
        """Why a program is of no use that failed before it asked anything."""
        return UserError(
            f"{self.name} raised on task {task.task_id} before it asked the policy anything (see above)"
        )

    def _report(self, error: BaseException) -> None:
        """The first traceback; later ones are only counted."""
        if not self._shown:
            self._shown = True
            becomes = "the program raised the above, which counts as a failed episode. Further ones are only"
            show_first(self.name, error, f"{becomes} counted, in env/{ERRORS}.")
