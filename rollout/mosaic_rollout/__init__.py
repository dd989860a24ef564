"""Rollouts: engines, the plan-check-act loop, branching and environments.

Token in, token out: the token ids an engine sampled are the truth; text is never re-tokenised to train on it.
"""
