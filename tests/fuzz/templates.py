"""What anybody can write into a conversation, through the chat templates of the families, to token ids."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from random import Random

import numpy as np

from mosaic_rollout.chat import Chat
from mosaic_rollout.chat.messages import OWN_WORDS
from mosaic_rollout.chat.reserved import mapped
from mosaic_rollout.types import JsonValue, Message, ToolSchema
from tests.fuzz import hostile
from tests.fuzz.subject import Subject, Try
from tests.rollout.families_for_tests import FAMILIES, Family

Turn = tuple[str, str, str]
"""What follows a turn: "observation" or "user_message", the tool's name, and the text."""
_WORDS = ("It", "is", "a.txt:", "3", "é", "漢字", "😀", '{"a": 1}', "\n", "  ", "\t", "50%", "“so”", "\\")


def _hostile_text(random: Random, family: Family) -> str:
    """Pieces of every kind, the family's own marks among them, sometimes cut in two."""
    own = (*family.special, *family.added, *([family.bos] if family.bos else []))
    pieces = [
        random.choice(own) if random.random() < 0.3 else random.choice(hostile.PIECES) for _ in range(8)
    ]
    text = "".join(pieces[: random.randrange(9)])
    place = random.randrange(len(text) + 1)
    return text[:place] + random.choice(("", "", " ", "\u200b", "\x00")) + text[place:]


def _ordinary_text(random: Random) -> str:
    return "x" + "".join(random.choice(_WORDS) for _ in range(random.randrange(8))) + "x"


def _drawn(random: Random, text: Callable[[], str]) -> tuple[list[Message], list[ToolSchema], list[Turn]]:
    """Opening messages, tools, and what tools and the user say after the policy's turns."""
    messages: list[Message] = [{"role": "system", "content": text()}] if random.random() < 0.5 else []
    messages.append({"role": "user", "content": text()})
    if random.random() < 0.3:
        said = text()
        while OWN_WORDS.search(said):  # an assistant's own, which stay as they are
            said = text()
        messages.append({"role": "assistant", "content": said})
        messages.append({"role": "user", "content": text()})
    tools: list[ToolSchema] = [
        {
            "type": "function",
            "function": {
                "name": f"tool_{number}",
                "description": text(),
                "parameters": {"type": "object", "properties": {"path": {"type": "string", "title": text()}}},
            },
        }
        for number in range(random.randrange(3))
    ]
    after: list[Turn] = []
    for _ in range(random.randrange(1, 4)):
        if tools and random.random() < 0.7:
            after.append(("observation", "tool_0", text()))
        else:
            after.append(("user_message", "", text()))
    return messages, tools, after


def _said(chat: Chat, messages: Sequence[Message], tools: Sequence[ToolSchema], after: Sequence[Turn]):
    """Token ids of the prompt, and of what follows each turn."""
    conversation = chat.conversation(messages, tools)
    found = [conversation.prompt[0]]
    for kind, tool, text in after:
        if kind == "observation":
            found.append(conversation.observation(text, tool)[0])
        else:
            found.append(conversation.user_message(text)[0])
    return found


def _harmless(value: JsonValue) -> JsonValue:
    return mapped(value, lambda text: text if text in _KEPT or not text.strip() else "x")


_KEPT = {
    *("role", "content", "system", "user", "assistant", "type", "function", "name", "description", "title"),
    *("parameters", "object", "properties", "path", "string", *(f"tool_{number}" for number in range(3))),
}


@contextlib.contextmanager
def _templates(folder: Path) -> Iterator[Try]:
    """No text makes a token live, and ordinary text is shown as the template itself shows it."""
    chats = {
        (name, teach): Chat(family.tokenizer(), teach_loop=teach, today=date(2026, 1, 2))
        for name, family in FAMILIES.items()
        for teach in (False, True)
    }

    def attempt(random: Random) -> str:
        name, teach = random.choice(list(chats))
        chat, family = chats[name, teach], FAMILIES[name]
        if random.random() < 0.4:
            _check_ordinary(random, chat, family, teach)
            return "ordinary"
        messages, tools, after = _drawn(random, lambda: _hostile_text(random, family))
        steer = set(chat.tokenizer.get_added_vocab().values())
        innocent = _said(
            chat,
            _harmless(messages),  # pyrefly: ignore [bad-argument-type]
            _harmless(tools),  # pyrefly: ignore [bad-argument-type]
            [(kind, tool, text if not text.strip() else "x") for kind, tool, text in after],
        )
        for found, plain in zip(_said(chat, messages, tools, after), innocent, strict=True):
            assert _live(found, steer) == _live(plain, steer), (name, teach, chat.decode(found))
        return "hostile"

    yield attempt


def _live(ids: np.ndarray, steer: set[int]) -> list[int]:
    return [token for token in ids.tolist() if token in steer]


def _check_ordinary(random: Random, chat: Chat, family: Family, teach: bool) -> None:
    """Prompt, a turn as the template writes it, and output are the template's text of the conversation."""
    if not family.has_tools or family.thinks_in_prompt or teach:
        return
    messages, tools, _ = _drawn(random, lambda: _ordinary_text(random))
    output = _ordinary_text(random)
    call = {"type": "function", "id": "call", "function": {"name": "tool_0", "arguments": {"path": "a"}}}
    turn: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer: Message = {"role": "tool", "name": "tool_0", "tool_call_id": "call", "content": output}
    if not tools:
        turn = {"role": "assistant", "content": "so"}
        answer = {"role": "user", "content": output}

    def rendered(conversation: list[Message]) -> str:
        return str(
            chat.tokenizer.apply_chat_template(
                conversation,  # pyrefly: ignore [bad-argument-type]
                tools=tools or None,  # pyrefly: ignore [bad-argument-type]
                add_generation_prompt=True,
                tokenize=False,
            )
        )

    prompt, whole = rendered(messages), rendered([*messages, turn, answer])
    assert whole.startswith(prompt)
    end = whole.index(family.special[0], len(prompt)) + len(family.special[0])
    found = _said(chat, messages, tools, [("observation" if tools else "user_message", "tool_0", output)])
    texts = [chat.decode(ids) for ids in found]
    assert texts == [prompt, whole[end:]], (texts, whole)


TEMPLATES = Subject("chat templates", 0.1, _templates)
