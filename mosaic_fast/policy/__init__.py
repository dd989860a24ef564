"""The policy: log-probs of a Hugging Face causal LM on a forest of rollouts."""

from mosaic_fast.policy.policy import Policy

__all__ = ["Policy"]
