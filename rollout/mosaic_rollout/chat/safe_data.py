"""Messages and schemas made safe for a template: the words of reserved.py broken up in all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mosaic_rollout.chat.messages import changed_texts, changed_tool
from mosaic_rollout.chat.reserved import Reserved
from mosaic_rollout.types import Message, ToolSchema


@dataclass(frozen=True)
class Data:
    """What a template is given of a conversation."""

    messages: Sequence[Message]
    tools: Sequence[ToolSchema] = ()

    def changed(self, change: Callable[[str], str], own: Callable[[str], str]) -> Data:
        """With every text changed; what an assistant says itself, by `own`."""
        return Data(
            [changed_texts(message, change, own) for message in self.messages],
            [changed_tool(tool, change) for tool in self.tools],
        )


def safe(data: Data, reserved: Reserved, live: Callable[[Data], list[int]]) -> Data:
    """The data without a reserved word, and without a part of one that the template completes.

    live: the tokens that steer in the data's rendering. A text that begins or ends like a reserved word, or
    is a piece of one, is put in quotes where the rendering has other such tokens without the quotes: a
    template that writes `<` + name + `>` shows a name `think` so. Elsewhere it stays as it is.
    """
    data = data.changed(reserved.neutral, reserved.neutral_own)
    if not _could_complete(data, reserved):
        return data
    quoted = data.changed(reserved.quoted, lambda text: reserved.quoted(text, own=True))
    return data if live(data) == live(quoted) else quoted


def _could_complete(data: Data, reserved: Reserved) -> bool:
    found: list[bool] = []

    def look(text: str) -> str:
        found.append(reserved.could_complete(text))
        return text

    def look_at_own(text: str) -> str:
        found.append(reserved.could_complete(text, own=True))
        return text

    data.changed(look, look_at_own)
    return any(found)
