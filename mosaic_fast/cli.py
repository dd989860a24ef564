"""How every command ends: its exit code, and a mistake in words. No torch.

Where commands print.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import TypeVar, get_type_hints

from rich.console import Console

from mosaic_fast.config.nearest import nearest
from mosaic_fast.errors import UserError

Arguments = TypeVar("Arguments")


def options(kind: type[Arguments], prog: str, arguments: Sequence[str] | None = None) -> Arguments:
    """A command line as a dataclass `kind`; default: the process's own.

    UserError names an option that there is not, and the one that may be meant; tyro itself reports values
    of another type, and exits then, and for --help.
    """
    import tyro

    given = list(sys.argv[1:] if arguments is None else arguments)
    there = [f"--{name}" for name in _names(kind)]
    taken = {"--help", *there, *(one.replace("--", "--no-", 1) for one in there)}
    unknown = [
        one for one in given if one.startswith("--") and one.partition("=")[0].replace("_", "-") not in taken
    ]
    if unknown:  # before values are read: those of other types and missing ones are less to the point
        raise UserError(no_such_option(unknown, there))
    return tyro.cli(kind, args=given, prog=prog, config=(tyro.conf.OmitArgPrefixes,))


def no_such_option(unknown: Sequence[str], there: Sequence[str]) -> str:
    """What to say of arguments that no option takes."""
    name = next((one for one in unknown if one.startswith("-")), None)
    if name is None:
        return f"the command line has {unknown[0]!r}, which belongs to no option; see --help"
    name = name.partition("=")[0]
    close = nearest(name, there)
    return f"{name}: no such option; {f'did you mean {close}?' if close else 'see --help'}"


def answer_at_once(parse: Callable[[], object]) -> None:
    """Answer --help or a mistake on the command line, and end; where there is neither, nothing is done.

    For the top of a command's module, so that nobody waits seconds for torch to be told of a typo.
    """

    def parsed() -> int:
        parse()
        return 0

    if code := run_cli(parsed):
        raise SystemExit(code)


def train() -> int:
    """`mosaic-train`, as it is installed: `python -m mosaic_fast.train`."""
    check_train_arguments()
    from mosaic_fast.train import main

    return run_cli(main)


def check_train_arguments(module: str = "mosaic_fast.train") -> None:
    """`answer_at_once` for training; of several ranks the first to find a mistake says it, later."""
    from mosaic_fast.config.read import parse_train_command

    if os.environ.get("WORLD_SIZE", "") in ("", "0", "1"):
        answer_at_once(lambda: parse_train_command(sys.argv[1:], module))


def _names(kind: type) -> Iterator[str]:
    """The options of a dataclass, as tyro writes them without the names of what they are nested in."""
    hints = get_type_hints(kind)
    for one in fields(kind):
        inner = hints[one.name]
        if isinstance(inner, type) and is_dataclass(inner):
            yield from _names(inner)
        else:
            yield one.name.replace("_", "-")


def run_cli(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; a UserError is printed to stderr without a traceback."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from mosaic_kernels.selfcheck import KernelMismatch  # torch, which is there where a kernel was

        if not isinstance(error, KernelMismatch):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has had enough, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("stopped; what the last checkpoint holds is kept", file=sys.stderr)
        return 130


def plain_console(*, stderr: bool = False, quiet: bool = False, width: int | None = None) -> Console:
    """A console that shows text as it is: names of folders, suites and models may look like rich's markup."""
    return Console(stderr=stderr, quiet=quiet, width=width, markup=False, emoji=False)
