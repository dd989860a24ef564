"""The environment that `[env]` describes. No torch."""

from __future__ import annotations

from mosaic_fast.config import Config
from mosaic_fast.config.hub import data_path
from mosaic_rollout.types import Environment


def build_environment(config: Config) -> Environment:
    """The environment that `env.name` names; imported only then."""
    env = config.env
    tasks = data_path(env.tasks, folder=env.name == "agentharm") if env.tasks else None
    held = data_path(env.heldout_tasks, "env.heldout_tasks") if env.heldout_tasks else None
    if env.name == "agentdojo":
        from mosaic_rollout.environments.agentdojo import AgentDojoEnvironment

        return AgentDojoEnvironment(
            env.suites or ("banking", "slack"),
            heldout_suites=env.heldout_suites,
            attack=env.attack or "important_instructions_no_names",
            max_observation_chars=env.max_observation_chars,
            demonstrations=env.demonstrations,
        )
    if env.name == "bfcl":
        from mosaic_rollout.environments.bfcl import BfclEnvironment

        return BfclEnvironment(
            env.suites or ("multi_turn_base",),
            heldout_suites=env.heldout_suites,
            max_observation_chars=env.max_observation_chars,
        )
    if env.name == "asb":
        from mosaic_rollout.environments.asb import AsbEnvironment

        return AsbEnvironment(
            env.suites, heldout_suites=env.heldout_suites, attack=env.attack or "observation"
        )
    if env.name == "agent_safetybench" and tasks is not None:
        from mosaic_rollout.environments.agent_safetybench import AgentSafetyBenchEnvironment

        return AgentSafetyBenchEnvironment(
            tasks,
            held,
            max_observation_chars=env.max_observation_chars,
        )
    if env.name == "agentharm" and tasks is not None:
        from mosaic_rollout.environments.agentharm import AgentHarmEnvironment

        return AgentHarmEnvironment(tasks, env.suites, max_observation_chars=env.max_observation_chars)
    if env.name == "privacylens" and tasks is not None:
        from mosaic_rollout.environments.privacylens import PrivacyLensEnvironment

        return PrivacyLensEnvironment(tasks)
    if env.name.startswith("agent:") and tasks is not None:
        from mosaic_rollout.environments.agent import AgentEnvironment

        return AgentEnvironment(env.name, tasks, held, timeout_s=env.agent_timeout_s)
    if ":" in env.name:
        from mosaic_rollout.environments.custom import load_environment

        return load_environment(
            env.name,
            None if tasks is None else str(tasks),
            None if held is None else str(held),
            max_observation_chars=env.max_observation_chars,
        )
    from mosaic_rollout.environments.world import WorldEnvironment

    return WorldEnvironment()
