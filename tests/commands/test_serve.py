"""What is wrong with the command line of a server is one line, before anything is loaded."""

from __future__ import annotations

import pytest

from mosaic_fast.errors import UserError
from mosaic_fast.serve import parse


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "can be reached from outside: --api-key-env"),
        (["--host", "example.org"], "can be reached from outside"),
        (["--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--port", "70000"], "--port must be between 0 and 65535"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--potr", "1"], "did you mean --port"),
    ],
)
def test_a_mistake_is_a_line(options: list[str], said: str):
    with pytest.raises(UserError, match=said):
        parse(["embedded", *options])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_no_key(host: str):
    assert parse(["embedded", "--host", host]).host == host
