"""What ranks tell each other of a rollout is all of it."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from mosaic_fast.distributed.exchange import packed, unpacked
from mosaic_rollout.types import Gate, Rollout, Step, Task, ToolCall, Verdict

TASK = Task("pay", "harmful", "train", object())  # a payload that no JSON could hold
CALL = ToolCall("pay", {"to": "Ä\u2028", "sums": [1, 2.5, None], "more": {"deep": True}})
STEP = Step(2, 5, "say", "plan", None, "tool_call", CALL, None, "done", 0, True, 4)
LAST = Step(6, 7, "", None, "check", "answer", None, "", None, 3, False)
PLAIN = Rollout(
    rollout_id=3,
    group_id=1,
    task=TASK,
    token_ids=np.array([1, 2**40, 3], np.int64),
    trained=np.array([False, True, True]),
    rollout_logprobs=np.array([0.0, -0.1, -1e-30], np.float32),
    steps=(STEP, LAST),
    status="answered",
    verdict=Verdict(True, False, 0.1, {"asr": 1.0}),
    messages=({"role": "user", "content": "hi", "tool_calls": [{"id": "a"}]},),
    shown_messages=({"role": "system", "content": "loop"}, {"role": "user", "content": "hi"}),
    shown_tools=({"type": "function", "function": {"name": "pay"}},),
    policy_version=4,
    prompt_tokens=5,
    cached_tokens=6,
)
EMPTY = replace(
    PLAIN,
    token_ids=np.zeros(0, np.int64),
    trained=np.zeros(0, np.bool_),
    rollout_logprobs=np.zeros(0, np.float32),
    steps=(),
    messages=(),
    verdict=Verdict(False, False, 0.0),
)
FORKED = replace(
    PLAIN,
    parent_id=0,  # false as a bool is, but not absent
    fork_position=0,
    gate=Gate(0, 2, (7, 8), False),
)


@pytest.mark.parametrize("rollout", [PLAIN, EMPTY, FORKED], ids=["plain", "empty", "forked"])
def test_a_rollout_arrives_as_it_was(rollout: Rollout):
    back = unpacked(json.loads(json.dumps(packed(rollout))), TASK)
    for field in fields(Rollout):
        ours, theirs = getattr(rollout, field.name), getattr(back, field.name)
        assert type(ours) is type(theirs), field.name
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype, field.name
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
        else:
            assert ours == theirs, field.name
