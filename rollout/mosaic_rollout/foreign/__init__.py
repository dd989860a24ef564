"""Code that is not ours: environments, tools and judges of users and of benchmark packages.

It is run, awaited, checked and described here, so that whatever it does ends as an observation of the policy
or as one line to the user. See code.py.
"""

from mosaic_rollout.foreign.checks import checked_verdict, plain_number
from mosaic_rollout.foreign.code import ForeignCode

__all__ = ["ForeignCode", "checked_verdict", "plain_number"]
