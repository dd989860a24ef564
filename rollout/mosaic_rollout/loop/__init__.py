"""The plan-check-act loop: episodes played by a policy, their tools, and where rollouts of a group fork."""
