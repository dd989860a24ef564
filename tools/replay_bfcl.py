"""Proof on the spot that the adapter keeps BFCL's meaning: its own ground truths, replayed through it.

    python -m tools.replay_bfcl

A policy that makes exactly the calls of the ground truth must be scored as done, one that does nothing must
not, unless nothing was to be done. Exits with 1 where fewer than the known numbers are.
"""

from __future__ import annotations

import sys

if (
    __name__ == "__main__" and len(sys.argv) > 1
):  # it takes no options; --help is answered before slow imports
    print(__doc__)
    raise SystemExit(0 if sys.argv[1] in ("-h", "--help") else 2)

import ast
from collections.abc import Mapping, Sequence
from typing import cast

from mosaic_rollout.environments.bfcl.api import CATEGORIES, Case, case_of
from mosaic_rollout.environments.bfcl.environment import BfclEnvironment, MultiTurnEpisode
from mosaic_rollout.environments.bfcl.schemas import argument_text, tool_name
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import JsonValue, Task, ToolCall, Verdict

UNSOLVED = {"multi_turn_miss_func": 1, "simple_java": 10, "live_simple": 2, "live_multiple": 2}
"""Category -> cases whose own ground truth BFCL's checker fails: a state that the solution does not reach,
Java lists of texts whose quotes are not taken off, arguments for which no value is acceptable."""


def replay(environment: BfclEnvironment, task: Task, *, act: bool = True) -> Verdict:
    """The verdict on an episode in which exactly the ground truth's calls were made (act False: none)."""
    episode, case = environment.reset(task), case_of(task)
    if isinstance(episode, MultiTurnEpisode):
        for turn in cast("Sequence[Sequence[str]]", case.ground_truth):
            for text in turn if act else ():
                episode.step(_parsed(text, episode))
            episode.next_user_message("Done.")
    elif act:
        for call in acceptable_calls(case):
            episode.step(call)
    return episode.score("Done.")


def acceptable_calls(case: Case) -> list[ToolCall]:
    """A single-turn case's calls, each argument with the first acceptable value; "" marks one left out.

    A relevance case, which accepts any call, gets one; an irrelevance case none.
    """
    functions = {str(f["name"]): f for f in cast("Sequence[Mapping[str, JsonValue]]", case.entry["function"])}
    if case.category == "live_relevance":
        return [ToolCall(tool_name(next(iter(functions))), {})]
    calls = []
    for name, arguments in _pairs(case.ground_truth):
        document = cast("Mapping[str, JsonValue]", functions[name]["parameters"])
        properties = cast("Mapping[str, Mapping[str, JsonValue]]", document["properties"])
        chosen: dict[str, JsonValue] = {}
        for key, values in arguments.items():
            if "" in values and key not in cast("Sequence[str]", document.get("required", [])):
                continue
            value = _plain(next((value for value in values if value != ""), ""))
            chosen[key] = argument_text(case.language, properties.get(key, {}), value)
        calls.append(ToolCall(tool_name(name), chosen))
    return calls


def _pairs(truth: Sequence[JsonValue]) -> list[tuple[str, Mapping[str, Sequence[JsonValue]]]]:
    calls = cast("Sequence[Mapping[str, Mapping[str, Sequence[JsonValue]]]]", truth)
    return [pair for call in calls for pair in call.items()]


def _plain(value: JsonValue) -> JsonValue:
    """An acceptable value; in a dict, also in one of a list, every value is a list of acceptable ones."""
    if isinstance(value, Mapping):
        inner = cast("Mapping[str, Sequence[JsonValue]]", value)
        return {key: options[0] for key, options in inner.items() if options and "" not in options}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _parsed(text: str, episode: MultiTurnEpisode) -> ToolCall:
    """A ground truth's call text as a call: positional arguments get their names."""
    node = ast.parse(text, mode="eval").body
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"not a plain call: {text}")
    name = node.func.id
    arguments = dict(zip(episode.method_parameters(name), map(ast.literal_eval, node.args), strict=False))
    arguments |= {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    return ToolCall(name, arguments)


def main() -> int:
    """Replay everything, print the counts and each failure."""
    failed = 0
    print(f"{'category':26} {'ground truth done':>18} {'idle done':>10}")
    for category in CATEGORIES:
        environment = BfclEnvironment([category])
        tasks = [task for split in ("train", "heldout") for task in environment.tasks(split)]
        undone = [task.task_id for task in tasks if not replay(environment, task).done]
        idle = sum(replay(environment, task, act=False).done for task in tasks)
        print(f"{category:26} {len(tasks) - len(undone):>13}/{len(tasks):<4} {idle:>10}")
        if len(undone) > UNSOLVED.get(category, 0):
            failed += len(undone)
            print("FAILED: " + ", ".join(undone))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
