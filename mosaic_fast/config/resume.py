"""What a resumed run may be given anew: the keys that do not change what it computes. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mosaic_fast.config import Config
from mosaic_fast.errors import UserError

_SERVERS = "where and how servers run"
_KERNELS = "rounding: another kernel adds up the same sums in another order"
_PATIENCE = "how long something is waited for"
_JUDGE_ADDRESS = "where the judge lives; its model, prompt and settings stay"
_JUDGE_COST = "what asking the judge may cost; the answers stay"
_SHOWN = "what is shown of the run"
_DISK = "what is kept on disk"

ACCEPTED: Mapping[str, str] = {
    "run_dir": "where the run lies",
    "steps": "more of them: the learning rate keeps its schedule (optim.schedule_steps)",
    "model.threads": "rounding: another number of threads may add up sums in another order",
    "model.attention": _KERNELS,
    "model.lm_head": _KERNELS,
    "loss.backend": _KERNELS,
    "engine.python": _SERVERS,
    "engine.urls": _SERVERS,
    "engine.servers": _SERVERS,
    "engine.device": _SERVERS,
    "engine.args": _SERVERS,
    "engine.weights": _SERVERS,
    "engine.verify_weights": _SERVERS,
    "engine.colocated": _SERVERS,
    "engine.max_inflight_tokens": _SERVERS,
    "engine.request_timeout_s": _PATIENCE,
    "engine.hang_timeout_s": _PATIENCE,
    "engine.startup_timeout_s": _PATIENCE,
    "judge.endpoint": _JUDGE_ADDRESS,
    "judge.api_key_env": _JUDGE_ADDRESS,
    "judge.parameters": "how the judge's server wants a request, which it may say itself (docs/judges.md)",
    "judge.timeout_s": _PATIENCE,
    "judge.retries": _PATIENCE,
    "judge.max_concurrent": _PATIENCE,
    "judge.max_calls": _JUDGE_COST,
    "judge.max_total_tokens": _JUDGE_COST,
    "judge.cache": _JUDGE_COST,
    "reward.require_signal": "whether a step without a signal stops the run; no step is computed otherwise",
    "env.eval_every": "how often the run is looked at; training does not read what is seen",
    "checkpoint.every": _DISK,
    "checkpoint.keep": _DISK,
    "trackers.console": _SHOWN,
    "trackers.log_to": _SHOWN,
    "trackers.project": _SHOWN,
}
"""Key -> why a resumed run may have another value of it. Every other key is refused."""


@dataclass(frozen=True)
class Change:
    """A key of which a resumed run has another value than before."""

    key: str
    before: object
    after: object

    def said(self) -> str:
        """A line for the user."""
        return f"from here on {self.key} is {self.after!r}, not {self.before!r}: {ACCEPTED[self.key]}"


def changes(stored: Config, asked: Config) -> list[Change]:
    """The accepted keys, but for run_dir, in which `asked` differs from the run's own configuration.

    UserError naming every other value that differs, and `steps` where there are fewer.
    """
    before = flatten(keep_schedule(stored, stored, asked.steps).model_dump())
    after = flatten(keep_schedule(stored, asked, asked.steps).model_dump())
    keys = before | after  # options of a user's own code may come and go
    found = [
        Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    ]
    refused = [change for change in found if change.key not in ACCEPTED or _fewer_steps(change)]
    if refused:
        lines = [f"  {c.key}: the run has {c.before!r}, you ask for {c.after!r}" for c in refused]
        more = ", there may be more steps but not fewer" if any(map(_fewer_steps, refused)) else ""
        raise UserError(
            "--resume goes on with the configuration of the run; these differ:\n"
            + "\n".join(lines)
            + f"\nleave them out to resume, or start a new run{more}"
        )
    return [change for change in found if change.key != "run_dir"]


def refuse_differences(stored: Config, asked: Config) -> None:
    """UserError naming every value that a resumed run may not have anew."""
    changes(stored, asked)


def keep_schedule(stored: Config, asked: Config, steps: int) -> Config:
    """`asked` with the learning rate of the run, where `steps` are not the run's: they do not move its end.

    The steps up to that end are then the same as without the others; after it the rate stays as it is there.
    """
    if steps == stored.steps or asked.optim.schedule_steps is not None:
        return asked
    optim = asked.optim.model_copy(update={"schedule_steps": stored.steps})
    return asked.model_copy(update={"optim": optim})


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested values by dotted key."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _fewer_steps(change: Change) -> bool:
    if change.key != "steps" or not isinstance(change.before, int) or not isinstance(change.after, int):
        return False
    return change.after < change.before
