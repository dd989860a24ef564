"""The scripted agent's trajectories, played against the world, as the embedded model writes them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

from mosaic_rollout.chat.grammar import REFUSAL_TOOL
from mosaic_rollout.chat.rewriting import said_of
from mosaic_rollout.environments.world import WorldEpisode, WorldTask
from mosaic_rollout.environments.world.script import Behaviour, script
from mosaic_rollout.types import ToolCall


@dataclass
class Transcript:
    """One scripted trajectory: the agent's turns, and the observation after each of them but the last."""

    episode: WorldEpisode
    turns: list[str] = field(default_factory=list)
    observations: list[str] = field(default_factory=list)
    answer: str | None = None


def write_call(call: ToolCall) -> str:
    body = json.dumps({"name": call.name, "arguments": call.arguments}, separators=(",", ":"))
    return f"<tool_call>{body}</tool_call>"


def play_script(task: WorldTask, behaviour: Behaviour, rng: random.Random) -> Transcript:
    """Play one task through. The transcript always ends in a final answer or a refusal."""
    transcript = Transcript(WorldEpisode(task))
    for move in script(task, behaviour, rng):
        transcript.turns.append(said_of(move, "") + (write_call(move.call) if move.call else ""))
        if move.call is not None and move.call.name != REFUSAL_TOOL:
            transcript.observations.append(transcript.episode.step(move.call).content)
        transcript.answer = move.answer
    return transcript
