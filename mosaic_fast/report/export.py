"""`python -m mosaic_fast.report.export RUN --format trl --out FILE`: decided pairs as rows.

TRL's preference format, conversational (https://huggingface.co/docs/trl/dataset_formats): one JSON object a
line, {"prompt": [messages], "chosen": [messages], "rejected": [messages], "tools": [schemas]}. The prompt is
what the policy's template was given, the text that teaches the loop included, and `tools` are the schemas
beside it. Assistant messages hold the text as it was sampled, tags and calls included: nothing is lost, and
every row has the same columns. Runs of earlier versions kept no schemas: their rows have no `tools`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import JsonValue

from mosaic_fast.cli import options, run_cli
from mosaic_fast.errors import UserError
from mosaic_fast.report.read import (
    Notes,
    decided,
    read_groups,
    require_run_folder,
    trajectory_files,
)
from mosaic_fast.run.trajectories import RolloutRow

Message = dict[str, JsonValue]


@dataclass(frozen=True)
class _Arguments:
    """Write the pairs that a run's judge decided, one row a pair; ties and identical rollouts give none."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    out: Path
    """JSON Lines file to write."""
    format: Literal["trl"] = "trl"
    """trl: {prompt, chosen, rejected}, for DPOTrainer and kin."""
    from_step: int = 1
    """First training step taken."""
    to_step: int | None = None
    """Last training step taken."""


def preference_rows(group: Sequence[RolloutRow]) -> Iterator[dict[str, JsonValue]]:
    """A row for every pair of the group of which one is better.

    Two rollouts, the first preferred: {"prompt": [user], "chosen": [assistant, tool, assistant],
    "rejected": [assistant], "task_id": ..., "kind": ..., "reason": ...}.
    """
    matrix = decided(group)
    if matrix is None:
        return
    turns = [_turns(row) for row in group]
    for i, j in permutations(range(len(group)), 2):
        if matrix[i][j] > 0.5 and turns[i] and turns[j] and turns[i] != turns[j]:
            prompt: list[JsonValue] = [dict(message) for message in group[i].messages]
            reason = group[i].reasons[j] if j < len(group[i].reasons) else ""
            row: dict[str, JsonValue] = {
                "prompt": prompt,
                "chosen": list(turns[i]),
                "rejected": list(turns[j]),
                "task_id": group[i].task_id,
                "kind": group[i].kind,
                "reason": reason,
            }
            if group[i].tools:
                row["tools"] = [dict(tool) for tool in group[i].tools]
            yield row


def _turns(row: RolloutRow) -> list[Message]:
    """What followed the opening messages: the policy's turns as sampled, and what the tools returned.

    Nothing of an episode with several contexts, which are no one conversation.
    """
    if row.contexts:
        return []
    messages: list[Message] = []
    for step in row.steps:
        messages.append({"role": "assistant", "content": step.text})
        if step.observation is not None:
            messages.append({"role": "tool", "content": step.observation})
    return messages


def main() -> int:
    arguments = options(_Arguments, "python -m mosaic_fast.report.export")
    require_run_folder(arguments.run)
    last = arguments.to_step
    files = [
        path
        for step, path in trajectory_files(arguments.run)
        if arguments.from_step <= step and (last is None or step <= last)
    ]
    if not files:
        raise UserError(f"{arguments.run} has no trajectories of the steps asked for")
    notes, count = Notes(), 0
    unfinished = arguments.out.with_name(f".tmp-{arguments.out.name}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for path in files:
                for group in read_groups(path, notes):
                    for row in preference_rows(group):
                        file.write(json.dumps(row) + "\n")
                        count += 1
        unfinished.replace(arguments.out)
    except OSError as error:
        raise UserError(f"--out: {arguments.out} cannot be written: {error.strerror or error}") from None
    for note in notes.texts:
        print(note)
    print(f"{arguments.out}  {count} pairs of {len(files)} training steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
