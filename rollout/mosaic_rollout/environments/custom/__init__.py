"""A user's own environment, named as `module:Class` in the configuration."""

from mosaic_rollout.environments.custom.environment import CustomEnvironment, load_environment

__all__ = ["CustomEnvironment", "load_environment"]
