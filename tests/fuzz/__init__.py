"""Inputs that nobody meant: never a traceback for the user, never a wrong status, never a lost trajectory."""
