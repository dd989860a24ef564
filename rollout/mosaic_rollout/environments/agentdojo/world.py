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
from mosaic_rollout.environments.attacks import Attack as WrittenAttack
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

    api: AgentDojo
    suite: Suite
    attack: Attack
    tools: tuple[ToolSchema, ...]
    runtime: Runtime
    user_tasks: Mapping[str, UserTask]
    injection_tasks: Mapping[str, InjectionTask]
    state_text: str  # the suite's state as YAML, with a {placeholder} wherever an injection can be put
    placeholder_defaults: Mapping[str, str]

    def opening_state(
        self, user_task: str, injection_task: str | None, attack: WrittenAttack | None = None
    ) -> State:
        """The state before the first call, parsed; episodes copy it. attack: in place of the suite's own.

        The injected text goes into the YAML text and not into the parsed state, because that is how AgentDojo
        does it and YAML folds its line breaks.
        """
        user, injections = self.user_tasks[user_task], {}
        if injection_task is not None:
            injections = self._attack(attack).attack(user, self.injection_tasks[injection_task])
        template = attack is not None and attack.template is not None
        if template:
            injections = dict.fromkeys(injections, _PLACE)
        text = self.state_text.format(**{**self.placeholder_defaults, **injections})
        found = yaml.load(text, _YAML_LOADER)
        if template and attack is not None and injection_task is not None:
            found = _put(found, attack.text(self.injection_tasks[injection_task].GOAL))
        return user.init_environment(self.suite.environment_type.model_validate(found))

    def _attack(self, attack: WrittenAttack | None) -> Attack:
        """AgentDojo's attack of that name; the suite's own for a template, which finds the places."""
        if attack is None or attack.template is not None:
            return self.attack
        return make_attack(self.api, self.suite, attack.name)


_PLACE = "MosaicAttackStandsHere"
"""A word that YAML leaves as it is: quotes and line breaks of a template are put in once it is parsed."""


def _put(value: object, text: str) -> object:
    """The value with every place in its strings filled."""
    if isinstance(value, str):
        return value.replace(_PLACE, text)
    if isinstance(value, dict):
        return {_put(key, text): _put(inner, text) for key, inner in value.items()}
    if isinstance(value, list):
        return [_put(inner, text) for inner in value]
    return value


def find_suites(api: AgentDojo, version: str, names: Sequence[str]) -> dict[str, Suite]:
    """The named suites of a benchmark version. Raises UserError naming those there are."""
    suites = api.suites(version)
    if not suites:
        raise UserError(f"AgentDojo has no benchmark version {version!r}; use 'v1.2.2'")
    if unknown := [name for name in names if name not in suites]:
        raise UserError(f"AgentDojo has no suite {', '.join(unknown)}; it has {', '.join(sorted(suites))}")
    return {name: suites[name] for name in names}


_ASKS_THE_KEYBOARD = "manual"
"""The attack of AgentDojo's that a person types."""


def make_attack(api: AgentDojo, suite: Suite, attack_name: str) -> Attack:
    """An attack on a suite. Raises UserError for an unknown one, or one without a goal."""
    if attack_name not in api.attacks:
        raise UserError(f"AgentDojo has no attack {attack_name!r}; it has {', '.join(sorted(api.attacks))}")
    attack = api.attacks[attack_name](suite, _local_pipeline(api))
    if attack_name == _ASKS_THE_KEYBOARD:
        raise UserError(f"{attack_name!r} asks for each injection at the keyboard; choose another attack")
    if attack.is_dos_attack:
        raise UserError(f"{attack_name!r} only keeps the agent from its task; choose an attack with a goal")
    return attack


def attack_names(api: AgentDojo, suite: Suite) -> tuple[str, ...]:
    """All of AgentDojo's attacks that have a goal, in the order of their names."""
    pipeline = _local_pipeline(api)
    known = sorted(set(api.attacks) - {_ASKS_THE_KEYBOARD})
    return tuple(name for name in known if not api.attacks[name](suite, pipeline).is_dos_attack)


def _local_pipeline(api: AgentDojo) -> object:
    pipeline = api.make_pipeline(None)
    setattr(pipeline, "name", "local")  # noqa: B010  attacks that address the model by name look it up by this
    return pipeline


def open_world(api: AgentDojo, suite: Suite, attack_name: str) -> World:
    """Make a suite ready to play. Raises UserError for an unknown attack."""
    return World(
        api=api,
        suite=suite,
        attack=make_attack(api, suite, attack_name),
        tools=tuple(tool_schema(tool) for tool in suite.tools),
        runtime=api.make_runtime(suite.tools),
        user_tasks=suite.user_tasks,
        injection_tasks=suite.injection_tasks,
        state_text=api.read_suite_file(suite.name, "environment.yaml", None),
        placeholder_defaults=suite.get_injection_vector_defaults(),
    )
