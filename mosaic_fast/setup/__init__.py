"""From a configuration to what a run plays with: model, tokenizer, environment, engine, reference.

`build.py` puts them together, and `ready.py` a whole run from its folder. `memory/` says before anything is
loaded what it will take (`--dry-run`); `embedded/` is the model that is shipped. Nothing is imported here, so
that commands answer without torch.
"""
