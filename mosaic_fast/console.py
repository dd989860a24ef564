"""Where commands print."""

from rich.console import Console


def plain_console(*, stderr: bool = False, quiet: bool = False, width: int | None = None) -> Console:
    """A console that shows text as it is: names of folders, suites and models may look like rich's markup."""
    return Console(stderr=stderr, quiet=quiet, width=width, markup=False, emoji=False)
