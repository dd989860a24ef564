"""How every command ends: its exit code, and a mistake in words. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mosaic_fast.errors import UserError


def run_cli(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; a UserError is printed to stderr without a traceback."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has had enough, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("stopped; what the last checkpoint holds is kept", file=sys.stderr)
        return 130
