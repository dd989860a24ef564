"""What the MOSAIC paper states for a metric (arXiv 2603.03205), as it states it; where it is silent, nothing.

Its figures are changes against the untrained model, on other models and suites than yours may be: a direction
to compare with, not a value to reach.
"""

STATED = {
    "safety/harmful_harm": "down by up to 50%",
    "safety/harmful_refused": "up by more than 20 points (under injection)",
    "safety/benign_done": "kept or better",
    "safety/leaked": "down",
    "safety/leaked_helpful": "down",
    "env/harm_score": "down by up to 50%",
    "env/benign_score": "kept or better",
    "rollout/safety_token_share": "under about 20%",
}
"""Metric -> the paper's words."""
