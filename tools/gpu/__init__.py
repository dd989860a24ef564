"""First contact with a GPU in one command: `make gpu`.

`__main__.py` runs the parts one after the other, each in a process of its own with a time box, and writes
one JSON file and one table after each. It needs Python alone; a part that lacks a package, a GPU or time is
listed with the reason, and the others go on. `parts.py` is what they do.
"""
