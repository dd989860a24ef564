"""Environments: sources of tasks, one package or module each."""
