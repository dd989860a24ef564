"""Same calls, same state: the two places where AgentDojo's tools look outside their world.

The mail, calendar and drive tools of workspace and travel stamp what they make with the machine's clock, and
a new calendar event lists its participants in the order of a set of strings, which differs from process to
process. Both reach the policy as observations. No checker looks at either.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, datetime, time
from typing import cast

from mosaic_rollout.environments.agentdojo.api import State

_NOON = time(12)


def settle(state: State, tool: str, called_at: datetime) -> None:
    """Date what a call of `tool`, begun at `called_at`, has made by the suite's own calendar; fix its order.

    Called after every call that did not fail.
    """
    today = _attribute(state, "calendar", "current_day")
    if not isinstance(today, date):
        return
    now = datetime.combine(today, _NOON)
    for email in _members(state, "inbox", "emails"):
        _put_back(email, "timestamp", called_at, now)
    for file in _members(state, "cloud_drive", "files"):
        _put_back(file, "last_modified", called_at, now)
    if tool == "create_calendar_event":
        events = list(_members(state, "calendar", "events"))
        cast("list[str]", _attribute(events[-1], "participants")).sort()


def _attribute(value: object, *names: str) -> object:
    for name in names:
        value = getattr(value, name, None)
    return value


def _members(state: State, *names: str) -> Iterable[object]:
    members = _attribute(state, *names)
    return members.values() if isinstance(members, dict) else ()


def _put_back(value: object, name: str, called_at: datetime, now: datetime) -> None:
    stamp = _attribute(value, name)
    if isinstance(stamp, datetime) and stamp.tzinfo is None and stamp >= called_at:
        setattr(value, name, now)
