"""A suite made ready to play: its tools as schemas, its attack, its state before and after a call.

Same calls, same state: AgentDojo's tools look outside their world in two places. The mail, calendar and drive
tools of workspace and travel stamp what they make with the machine's clock, and a new calendar event lists
its participants in the order of a set of strings, which differs from process to process. Both reach the
policy as observations. No checker looks at either. `settle` mends both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import cast

import yaml

from mosaic_rollout.environments.agentdojo.api import (
    AgentDojo,
    Attack,
    InjectionTask,
    Runtime,
    State,
    Suite,
    Tool,
    UserTask,
)
from mosaic_rollout.environments.guarded import function_tool
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import JsonValue, ToolSchema


def tool_schema(tool: Tool) -> ToolSchema:
    """One tool: its own name, description and parameters."""
    parameters = without_titles(tool.parameters.model_json_schema())
    return function_tool(tool.name, tool.description, parameters)


def without_titles(schema: JsonValue) -> JsonValue:
    """A JSON schema without its `title` annotations, which repeat the argument's name: a tenth of the tokens.

    An argument that is itself named `title` stays.

    >>> without_titles({"title": "A", "properties": {"title": {"title": "Title", "type": "string"}}})
    {'properties': {'title': {'type': 'string'}}}
    """
    if isinstance(schema, Mapping):
        mapping = cast("Mapping[str, JsonValue]", schema)
        kept: dict[str, JsonValue] = {}
        for key, value in mapping.items():
            if key == "title":
                continue
            if key in ("properties", "$defs") and isinstance(value, Mapping):
                named = cast("Mapping[str, JsonValue]", value)
                kept[key] = {name: without_titles(sub) for name, sub in named.items()}
            else:
                kept[key] = without_titles(value)
        return kept
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [without_titles(item) for item in schema]
    return schema


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


_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 5x faster where PyYAML was built with libyaml


@dataclass(frozen=True)
class World:
    """One suite, loaded once and shared by all its episodes."""

    suite: Suite
    attack: Attack
    tools: tuple[ToolSchema, ...]
    runtime: Runtime
    user_tasks: Mapping[str, UserTask]
    injection_tasks: Mapping[str, InjectionTask]
    state_text: str  # the suite's state as YAML, with a {placeholder} wherever an injection can be put
    placeholder_defaults: Mapping[str, str]

    def opening_state(self, user_task: str, injection_task: str | None) -> State:
        """The state before the first call, parsed; episodes copy it.

        The injected text goes into the YAML text and not into the parsed state, because that is how AgentDojo
        does it and YAML folds its line breaks.
        """
        user, injections = self.user_tasks[user_task], {}
        if injection_task is not None:
            injections = self.attack.attack(user, self.injection_tasks[injection_task])
        text = self.state_text.format(**{**self.placeholder_defaults, **injections})
        state = self.suite.environment_type.model_validate(yaml.load(text, _YAML_LOADER))
        return user.init_environment(state)


def find_suites(api: AgentDojo, version: str, names: Sequence[str]) -> dict[str, Suite]:
    """The named suites of a benchmark version. Raises UserError naming those there are."""
    suites = api.suites(version)
    if not suites:
        raise UserError(f"AgentDojo has no benchmark version {version!r}; use 'v1.2.2'")
    if unknown := [name for name in names if name not in suites]:
        raise UserError(f"AgentDojo has no suite {', '.join(unknown)}; it has {', '.join(sorted(suites))}")
    return {name: suites[name] for name in names}


def open_world(api: AgentDojo, suite: Suite, attack_name: str) -> World:
    """Make a suite ready to play. Raises UserError for an unknown attack."""
    if attack_name not in api.attacks:
        raise UserError(f"AgentDojo has no attack {attack_name!r}; it has {', '.join(sorted(api.attacks))}")
    pipeline = api.make_pipeline(None)
    setattr(pipeline, "name", "local")  # noqa: B010  attacks that address the model by name look it up by this
    attack = api.attacks[attack_name](suite, pipeline)
    if attack.is_dos_attack:
        raise UserError(f"{attack_name!r} only keeps the agent from its task; choose an attack with a goal")
    return World(
        suite=suite,
        attack=attack,
        tools=tuple(tool_schema(tool) for tool in suite.tools),
        runtime=api.make_runtime(suite.tools),
        user_tasks=suite.user_tasks,
        injection_tasks=suite.injection_tasks,
        state_text=api.read_suite_file(suite.name, "environment.yaml", None),
        placeholder_defaults=suite.get_injection_vector_defaults(),
    )
