"""The prefix tree of a group for the eye: tokens that the same rollouts share, and what parts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mosaic_fast.run.trajectories import RolloutRow, StepRow
from mosaic_kernels import pack_forest

_TEXT_SHOWN = 120  # characters of a branch's own text


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) that exactly `members` have in common. Two rollouts that fork after five tokens:

    Segment(-1, 0, 5, (0, 1), ...), Segment(0, 5, 9, (0,), ...), Segment(0, 5, 8, (1,), ...)
    """

    parent: int  # index of the segment above, -1 at the root
    start: int
    end: int
    members: tuple[int, ...]  # places in the group
    step: int | None = None  # the step that the branch begins in, from 0; None above the first fork
    part: str = ""  # plan, check, action or observation
    text: str = ""  # how its text goes on where its siblings' goes otherwise


def group_tree(group: Sequence[RolloutRow]) -> list[Segment]:
    """The segments of a group, parents first. ValueError where the token ids are no rollouts."""
    forest = pack_forest([row.token_ids for row in group])
    bounds = forest.cu_seqlens
    paths = [forest.node_index[a:b] for a, b in pairwise(bounds.tolist())]
    through = np.bincount(forest.node_index, minlength=forest.num_nodes)  # rollouts through a node
    spans: dict[int, tuple[int, int, int, list[int]]] = {}  # first node -> parent's, start, end, members
    for member, path in enumerate(paths):
        if not len(path):
            continue
        cuts = [0, *(np.flatnonzero(np.diff(through[path])) + 1).tolist(), len(path)]
        above = -1
        for start, end in pairwise(cuts):
            first = int(path[start])
            spans.setdefault(first, (above, start, end, []))[3].append(member)
            above = first
    number = {first: i for i, first in enumerate(spans)}
    segments = [
        Segment(number.get(above, -1), start, end, tuple(members))
        for above, start, end, members in spans.values()
    ]
    return [_labelled(segment, segments, group) for segment in segments]


def token_parts(row: RolloutRow) -> dict[str, int]:
    """Tokens of a rollout by what they are: prompt, plan, check, action, observation."""
    parts = dict.fromkeys(("prompt", "plan", "check", "action", "observation"), 0)
    before, kind = 0, "prompt"
    for step in row.steps:
        start, end = step.span
        check, action = _borders(step)
        parts[kind] += start - before
        parts["plan"] += check - start
        parts["check"] += action - check
        parts["action"] += end - action
        before, kind = end, "observation"
    parts[kind] += max(0, len(row.token_ids) - before)
    return parts


def _borders(step: StepRow) -> tuple[int, int]:
    """Where check and action of a step begin; a step without a readable plan is all action."""
    start, end = step.span
    check = min(max(start if step.check_start is None else step.check_start, start), end)
    return check, min(check + max(0, step.safety_tokens), end)


def _labelled(segment: Segment, segments: Sequence[Segment], group: Sequence[RolloutRow]) -> Segment:
    """The segment with the place and the text by which it leaves its siblings."""
    if segment.parent < 0:
        return segment
    row = group[segment.members[0]]
    at = next((i for i, step in enumerate(row.steps) if segment.start < step.span[1]), None)
    if at is None:
        at, part = len(row.steps) - 1, "observation"
    elif segment.start < row.steps[at].span[0]:
        at, part = at - 1, "observation"
    else:
        check, action = _borders(row.steps[at])
        part = "plan" if segment.start < check else "check" if segment.start < action else "action"
    if at < 0:
        return segment
    others = [group[m] for m in segments[segment.parent].members if m not in segment.members]
    texts = [_text(other, at, part) for other in others]
    own = _text(row, at, part)
    shared = max((_parting(own, text) for text in texts), default=0)
    text = own[shared : shared + _TEXT_SHOWN]
    return Segment(segment.parent, segment.start, segment.end, segment.members, at, part, text)


def _text(row: RolloutRow, step: int, part: str) -> str:
    if step >= len(row.steps):
        return ""
    return (row.steps[step].observation or "") if part == "observation" else row.steps[step].text


def _parting(one: str, other: str) -> int:
    """Index of the first word of `one`, or tag, that `other` does not begin with as well."""
    same = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    while 0 < same < len(one) and not (one[same - 1].isspace() or one[same - 1] in '>":,'):
        same -= 1
    return same
