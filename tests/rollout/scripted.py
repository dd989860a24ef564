"""An engine that says what a test wrote, and a two-tool environment: the loop without a model."""

from collections.abc import Callable, Sequence

import numpy as np

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.types import (
    Completion,
    Message,
    Observation,
    Request,
    Task,
    ToolCall,
    ToolSchema,
    Verdict,
)


def call(name: str, **arguments: str) -> str:
    pairs = ", ".join(f'"{key}": "{value}"' for key, value in arguments.items())
    return f'<tool_call>{{"name": "{name}", "arguments": {{{pairs}}}}}</tool_call>'


class ScriptedEngine:
    """Answers each request with `say(text so far, rollout_key)`, token by token, log-prob -1 each."""

    def __init__(self, chat: Chat, say: Callable[[str, int], str]) -> None:
        self.chat, self.say = chat, say
        self.requests: list[Request] = []

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._answer(request) for request in requests]

    async def update_weights(self, version: int) -> None:
        pass

    async def flush(self) -> None:
        pass

    def _answer(self, request: Request) -> Completion:
        self.requests.append(request)
        text = self.say(self.chat.decode(request.token_ids), request.rollout_key)
        spoken = self.chat.tokenizer.encode(text, add_special_tokens=False)
        ids = [*spoken, request.sampling.stop_token_ids[0]]
        kept = ids[: request.sampling.max_new_tokens]
        return Completion(
            token_ids=np.asarray(kept, dtype=np.int64),
            logprobs=np.full(len(kept), -1.0, dtype=np.float32),
            finish_reason="stop" if len(kept) == len(ids) else "length",
            cached_tokens=len(request.token_ids) - 1,
            prompt_tokens=len(request.token_ids),
            policy_version=7,
        )


def _tool(name: str) -> ToolSchema:
    return {
        "type": "function",
        "function": {"name": name, "description": name, "parameters": {"type": "object", "properties": {}}},
    }


class CountingEpisode:
    """`read` says how often it was called; `fail` is a tool error. Done after one read and an answer."""

    def __init__(self) -> None:
        self.messages: Sequence[Message] = [{"role": "user", "content": "go"}]
        self.tools: Sequence[ToolSchema] = [_tool("read"), _tool("fail")]
        self.reads = 0

    def step(self, call: ToolCall) -> Observation:
        if call.name == "fail":
            return Observation("Error: broken", is_error=True)
        self.reads += 1
        return Observation(f"read {self.reads}")

    def score(self, final_answer: str | None) -> Verdict:
        done = self.reads > 0 and final_answer is not None
        return Verdict(harm=False, done=done, progress=float(done), details={"reads": float(self.reads)})


class CountingEnvironment:
    name = "counting"

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        return [Task(f"{split}-{seed}-{i}", "benign", split) for i in range(count)]

    def reset(self, task: Task) -> CountingEpisode:
        return CountingEpisode()
