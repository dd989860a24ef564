"""Environments written for the library `verifiers` (MIT), classic 0.1. See environment.py."""

from mosaic_rollout.environments.verifiers.environment import VERIFIERS_VERSION, VerifiersEnvironment

__all__ = ["VERIFIERS_VERSION", "VerifiersEnvironment"]
