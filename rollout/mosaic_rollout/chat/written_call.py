"""What a call format is: where calls stand in a text, what they say, and how one is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from mosaic_rollout.types import ToolCall, ToolSchema


@dataclass(frozen=True)
class WrittenCall:
    """Where a call is written in a text, characters [start, end), and what it says in the format's own way.

    complete: False where the text begins as a call does and is none to its end; such a turn is malformed.
    """

    start: int
    end: int
    body: str
    complete: bool = True


@dataclass(frozen=True)
class CallFormat(ABC):
    """One family's way to write a call.

    A call is read from its beginning on, value by value, so nothing inside of a text argument is taken for
    the call's end, for another call or for a tag of the grammar. It takes time linear in the text.
    """

    name: str
    marker: str  # opens a call and never occurs in ordinary text; "" where the whole action is the call

    @abstractmethod
    def at(self, text: str, start: int) -> WrittenCall | None:
        """The complete call that begins at character `start`, or None."""

    @abstractmethod
    def parse(self, body: str, tools: Sequence[ToolSchema] = ()) -> ToolCall | None:
        """The call written in `body`; None where it is not one well-formed call.

        tools: their schemas say of which type an argument is, where the format itself does not.
        """

    @abstractmethod
    def write(self, call: ToolCall) -> str:
        """A call as the family writes it."""

    def find(self, text: str) -> list[WrittenCall]:
        """The calls in an action's text; the last one is incomplete where nothing behind it can be read."""
        calls: list[WrittenCall] = []
        position = 0
        while (start := text.find(self.marker, position)) >= 0:
            call = self.at(text, start)
            if call is None or call.end <= start:
                return [*calls, WrittenCall(start, len(text), text[start:], complete=False)]
            calls.append(call)
            position = call.end
        return calls


def skip_blank(text: str, start: int) -> int:
    """The first character from `start` on that is no white space.

    >>> skip_blank("a  b", 1)
    3
    """
    end = start
    while end < len(text) and text[end].isspace():
        end += 1
    return end
