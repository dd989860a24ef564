"""A stream of events ends its lines at line feeds only, wherever its bytes are cut."""

import asyncio
from collections.abc import AsyncIterator

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_rollout.engine.sglang.client import _lines

LINES = st.lists(st.text(st.sampled_from("ab \u2028\x85\x0b\x0c\x1eé漢😀{}"), max_size=8), max_size=5)


@settings(max_examples=40)
@given(LINES, st.integers(1, 5), st.sampled_from(["\n", "\r\n"]))
def test_lines_come_as_they_were_sent(lines: list[str], size: int, end: str):
    content = end.join(lines).encode()

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(content), size):
            yield content[start : start + size]

    async def read() -> list[str]:
        return [line async for line in _lines(httpx.Response(200, content=parts()))]

    assert asyncio.run(read()) == (lines or [""])
