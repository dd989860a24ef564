"""A user's own environment, named as `module:Class` in the configuration or given as an object."""

from mosaic_rollout.environments.custom.environment import CustomEnvironment, load_environment
from mosaic_rollout.environments.custom.given import GivenTasks, given_environment, spec_of, split_tasks

__all__ = [
    "CustomEnvironment",
    "GivenTasks",
    "given_environment",
    "load_environment",
    "spec_of",
    "split_tasks",
]
