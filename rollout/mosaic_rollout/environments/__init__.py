"""Environments: sources of tasks, and what is common to them.

An adapter of a benchmark is a module or a package here: it reads the benchmark's tasks and divides them into
train and held-out ones (`sources`), and plays one as an episode around code that is not ours (`guarded`).
`custom` has a user's own environment, `world` the embedded one. Each is imported only where it is asked for:
most need a package of their own.
"""
