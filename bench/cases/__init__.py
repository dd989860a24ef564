"""The cases: each module has `check`, `ideal` and `run`; nothing is timed before `check` passes."""
