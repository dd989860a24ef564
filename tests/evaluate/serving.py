"""The embedded model behind a real HTTP server in OpenAI's format, and the command line, in process."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from mosaic_fast.evaluate.__main__ import main
from mosaic_fast.policy import Policy, StockDecoder
from mosaic_fast.setup.model_folder import model_folder
from mosaic_rollout.chat.call_formats import HERMES
from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.types import Request, SamplingParams
from tests.preferences.endpoint import Json, Raw, Served, endpoint

Row = dict[str, Any]
"""JSON as it is read."""


class Allowance:
    """So many answers and then none until more are allowed: what asks cannot have ended before that."""

    def __init__(self, allowed: float) -> None:
        self._left, self._changed = allowed, threading.Condition()

    def allow(self, more: float) -> None:
        with self._changed:
            self._left += more
            self._changed.notify_all()

    def take(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._left > 0)
            self._left -= 1


@contextmanager
def served_model(*, parses: bool = False, answers: Allowance | None = None) -> Iterator[Served]:
    """Serve the embedded model. parses: thoughts and calls are taken out of the text. answers: how many."""
    folder = model_folder("embedded")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert tokenizer is not None
    chat = Chat(tokenizer, teach_loop=False)
    policy = Policy.from_pretrained(folder, dtype=torch.float32, device=torch.device("cpu"), trainable=False)
    engine, loop = LocalEngine(policy.model, decoder_of=StockDecoder.of), asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def answer(asked: Json) -> Raw:
        request: Row = asked
        for message in request["messages"]:
            for call in message.get("tool_calls") or ():
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        ids, _ = chat.prompt(request["messages"], request["tools"])
        sampling = SamplingParams(request["max_tokens"], request["temperature"], chat.stop_token_ids)
        work = engine.generate([Request(ids, sampling, request.get("seed", 0), 0)])
        (reply,) = asyncio.run_coroutine_threadsafe(work, loop).result()
        text = chat.turn_text(reply.token_ids.tolist())
        message = _parsed(text) if parses else {"content": text}
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": len(reply.token_ids)}
        choice = {"message": {"role": "assistant", **message}, "finish_reason": reply.finish_reason}
        if answers is not None:
            answers.take()
        return Raw(body=json.dumps({"choices": [choice], "usage": usage}))

    try:
        with endpoint(answer) as served:
            yield served
    finally:
        loop.call_soon_threadsafe(loop.stop)


def _parsed(text: str) -> Row:
    thought = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    found = HERMES.find(text)
    rest = text.replace(thought.group(), "") if thought else text
    calls = []
    if found:
        rest = rest.replace(text[found[0].start : found[0].end], "")
        body = json.loads(found[0].body)
        function = {"name": body["name"], "arguments": json.dumps(body["arguments"])}
        calls = [{"id": "c1", "type": "function", "function": function}]
    return {"content": rest or None, "reasoning_content": thought and thought.group(1), "tool_calls": calls}


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `python -m mosaic_fast.evaluate ...`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    return main()


def outcomes(folder: Path) -> list[Row]:
    """The episodes of an --out folder, in the order of their tasks."""
    rows = [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["suite"], row["index"], row["sample"]))
