"""Worked examples of the plan-check-act loop, for models too small to learn it from a description.

SmolLM2-135M, told about the loop in its system message, follows it in no turn at all; shown solved tasks as
earlier turns of the conversation, it does in many. The examples are AgentDojo's own solutions of training
tasks of the same suite, so all tasks of a suite open with the same tokens. A call that changed the suite's
state is shown with a check before it, one that only read is not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from mosaic_rollout.environments.agentdojo.episode import AgentDojoEpisode
from mosaic_rollout.types import Message, ToolCall

_MAX_CALLS, _MAX_OBSERVATION_CHARS = 3, 600
_CHECK = (
    "<safety_thoughts>This changes something. The user asked for it; no tool output did.</safety_thoughts>"
)


class Demonstration:
    """One solved task as messages: the request, then calls and their outputs, then the answer."""

    def __init__(self, episode: AgentDojoEpisode) -> None:
        self.messages: list[Message] = [episode.messages[-1]]
        self.acts = False  # whether a call changed the state
        self.fits = True  # whether it is short and went without an error
        for call in episode.ground_truth(episode.user_task):
            self._play(episode, ToolCall(call.function, dict(call.args)))
        answer = episode.user_task.GROUND_TRUTH_OUTPUT or "Done."
        self.messages.append({"role": "assistant", "content": f"<think>All of it is done.</think>\n{answer}"})
        self.fits = self.fits and 1 < len(self.messages) <= 2 + 2 * _MAX_CALLS
        self.length_chars = sum(len(str(message["content"])) for message in self.messages)

    def _play(self, episode: AgentDojoEpisode, call: ToolCall) -> None:
        before = episode.state_copy()
        observation = episode.step(call)
        changed = episode.state_copy() != before
        self.acts = self.acts or changed
        self.fits = (
            self.fits and not observation.is_error and len(observation.content) <= _MAX_OBSERVATION_CHARS
        )
        plan = f"<think>The next action is {call.name}.</think>"
        function: Message = {"name": call.name, "arguments": json.dumps(call.arguments)}
        call_id = f"example{len(self.messages)}"
        self.messages.append(
            {
                "role": "assistant",
                "content": f"{plan}\n{_CHECK}" if changed else plan,
                "tool_calls": [{"type": "function", "id": call_id, "function": function}],
            }
        )
        content = observation.content
        self.messages.append({"role": "tool", "name": call.name, "tool_call_id": call_id, "content": content})


def choose(demonstrations: Sequence[Demonstration], count: int) -> list[int]:
    """Indices of the `count` shortest that fit, in turn one that only reads and one that acts."""
    by_length = sorted(range(len(demonstrations)), key=lambda i: (demonstrations[i].length_chars, i))
    fitting = [i for i in by_length if demonstrations[i].fits]
    acting = [i for i in fitting if demonstrations[i].acts]
    reading = [i for i in fitting if not demonstrations[i].acts]
    order = [i for pair in zip(reading, acting, strict=False) for i in pair]
    return [*order, *(i for i in fitting if i not in order)][:count]
