"""A suite made ready to play: its tools as schemas, its attack, its state before the first call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from mosaic_rollout.environments.agentdojo.api import (
    AgentDojo,
    Attack,
    InjectionTask,
    Runtime,
    State,
    Suite,
    UserTask,
)
from mosaic_rollout.environments.agentdojo.schemas import tool_schema
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import ToolSchema

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
