"""Training examples of the cold start: scripted trajectories, and drills that teach copying first."""

from __future__ import annotations

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from mosaic_rollout.chat.grammar import REFUSAL_SCHEMA
from mosaic_rollout.environments.world import values
from mosaic_rollout.environments.world.environment import TOOLS
from mosaic_rollout.environments.world.script import Behaviour
from mosaic_rollout.environments.world.tasks import make_task
from mosaic_rollout.types import TaskKind
from tools.warmstart.script import Transcript, play_script, write_call
from tools.warmstart.tokenizer import ASSISTANT, END_OF_TURN, TOOL, USER

KIND_WEIGHTS: dict[TaskKind, float] = {"harmful": 0.33, "benign": 0.34, "injected": 0.33}
_RECALLED_VALUES = (4, 8)  # fewest and most values of a recall drill


@dataclass(frozen=True)
class Example:
    """One sequence without the system prompt, which all examples share. L tokens."""

    token_ids: list[int]  # [L]
    trained: list[bool]  # [L], True where the model is to predict the token


class ExampleMaker:
    """Makes examples from training wordings and values only."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, behaviour: Behaviour) -> None:
        self._tokenizer, self._behaviour = tokenizer, behaviour

    def system_prompt(self) -> list[int]:
        """Token ids of the system message that lists the tools."""
        text = str(
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": ""}], tools=[*TOOLS, REFUSAL_SCHEMA], tokenize=False
            )
        )
        return self._encode(text[: text.index(USER)])

    def trajectory(self, rng: random.Random) -> Example:
        """A scripted trajectory of a random training task; what the agent says is trained."""
        kind = rng.choices(list(KIND_WEIGHTS), weights=list(KIND_WEIGHTS.values()))[0]
        return self.of_transcript(play_script(make_task(kind, "train", rng), self._behaviour, rng))

    def of_transcript(self, transcript: Transcript) -> Example:
        parts = [(f"{USER}{transcript.episode.task.request}{END_OF_TURN}{ASSISTANT}", False)]
        for index, turn in enumerate(transcript.turns):
            parts.append((turn + END_OF_TURN, True))
            if index < len(transcript.observations):
                observation = transcript.observations[index]
                parts.append((f"{TOOL}{observation}{END_OF_TURN}{ASSISTANT}", False))
        return self._join(parts)

    def argument_drill(self, rng: random.Random) -> Example:
        """From a request straight to the arguments of one of its calls, all of them named in the request."""
        while True:
            task = make_task(rng.choice(("harmful", "benign")), "train", rng)
            calls = [
                call for call in task.plan if all(str(v) in task.request for v in call.arguments.values())
            ]
            if calls:
                head, marker, tail = write_call(rng.choice(calls)).partition('","arguments"')
                request = f"{USER}{task.request}{END_OF_TURN}{ASSISTANT}{head}"
                return self._join([(request, False), (marker + tail + END_OF_TURN, True)])

    def recall_drill(self, rng: random.Random) -> Example:
        """Values of one sort in a row, then again in another order; the first piece of each is given.

        Nothing but looking the first piece up solves it, which is the skill that copying a value needs.
        """
        pool = rng.choice((values.NAMES, values.NAMES, values.TOPICS, values.FILES, values.AMOUNTS))["train"]
        chosen: dict[int, list[int]] = {}  # by first piece, no two values alike in it
        for value in rng.sample(pool, rng.randint(*_RECALLED_VALUES)):
            ids = self._encode(value)
            chosen.setdefault(ids[0], ids)
        comma, order = self._encode(","), list(chosen.values())
        token_ids = self._encode(USER) + [i for ids in order for i in (*ids, *comma)]
        token_ids += self._encode(END_OF_TURN + ASSISTANT)
        trained = [False] * len(token_ids)
        rng.shuffle(order)
        for ids in order:
            token_ids += ids
            trained += [False] + [True] * (len(ids) - 1)
        return Example(token_ids, trained)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _join(self, parts: list[tuple[str, bool]]) -> Example:
        token_ids: list[int] = []
        trained: list[bool] = []
        for text, is_trained in parts:
            ids = self._encode(text)
            token_ids += ids
            trained += [is_trained] * len(ids)
        return Example(token_ids, trained)
