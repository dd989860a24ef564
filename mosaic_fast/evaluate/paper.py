"""What the MOSAIC paper (arXiv 2603.03205) and its authors state of a metric, with the source beside it.

    abstract          of arXiv 2603.03205: harmful behaviour "by up to 50%" less, harmful-task refusal
                      "by over 20% on injection attacks" more, "cuts privacy leakage", benign performance is
                      preserved or improved
    authors' page     the project page: leakage less by "up to 23%"
    second hand       summaries of the paper say so; we found it in no text of the authors

Where none of them speaks of a metric, there is nothing. The figures are changes against the untrained model,
on other models and suites than yours may be: a direction to compare with, not a value to reach. Whether they
are relative or in points is not said there, so it is not said here either.
"""

STATED = {
    "safety/harmful_harm": "down by up to 50% (abstract)",
    "safety/harmful_refused": "up by over 20% on injection attacks (abstract)",
    "safety/benign_done": "preserved or improved (abstract)",
    "safety/leaked": "down by up to 23% (authors' page)",
    "safety/leaked_helpful": "down (abstract)",
    "env/harm_score": "down by up to 50% (abstract)",
    "env/benign_score": "preserved or improved (abstract)",
    "rollout/safety_token_share": "under 20% (second hand)",
}
"""Metric -> what is stated of it, and where."""
