"""The texts a policy is taught with, one file a version."""

from importlib.resources import files


def load_prompt(name: str) -> str:
    """The text of `prompts/<name>.md`, without its last newline."""
    return files(__name__).joinpath(f"{name}.md").read_text(encoding="utf-8").rstrip("\n")
