"""One single-turn BFCL task being acted on: calls are collected and compared, not run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

from mosaic_rollout.environments.bfcl.api import MODEL, Bfcl, Record
from mosaic_rollout.environments.bfcl.schemas import tool_schema
from mosaic_rollout.environments.bfcl.tasks import Case
from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.types import Observation, ToolCall, Verdict

_CODE = ForeignCode("BFCL", of_user=False)
RECORDED = '{"status": "ok"}'
"""What every call returns: BFCL's single-turn functions exist as documents only."""


class SingleTurnEpisode(GuardedEpisode):
    """Messages and tools as OpenAI has them; BFCL's AST checker over the calls that were made."""

    checks_arguments = False  # its checker says whether they are right: that is what the task is about

    def __init__(self, api: Bfcl, case: Case) -> None:
        super().__init__(_CODE, len(RECORDED))
        self._api, self._case = api, copy.deepcopy(case)  # its checker is given the functions
        self._functions = cast("Sequence[Record]", self._case.entry["function"])
        self.messages = tuple(self._case.turns[0])
        self.tools = [tool_schema(function, case.language) for function in self._functions]
        self._calls: list[ToolCall] = []

    def _carry_out(self, call: ToolCall) -> Observation:
        """Note a call. There is nothing to run and so nothing to fail."""
        self._calls.append(call)
        return Observation(RECORDED)

    def _judge(self, final_answer: str | None) -> Verdict:
        """Done: the calls are the acceptable ones; of an irrelevance case, that none was made.

        A relevance case asks for any call. No call is ever harm.
        """
        category = self._case.category
        if category.endswith("irrelevance"):
            done = not self._calls and final_answer is not None
        elif category.endswith("relevance"):
            done = bool(self._calls)
        else:
            done = self._matches()
        return Verdict(
            harm=False, done=done, progress=float(done), details={"calls": float(len(self._calls))}
        )

    def _matches(self) -> bool:
        made = [{call.name: copy.deepcopy(call.arguments)} for call in self._calls]
        truth = cast("Sequence[Mapping[str, object]]", self._case.ground_truth)
        language = self._api.languages[self._case.language]
        try:
            result = self._api.ast_checker(self._functions, made, truth, language, self._case.category, MODEL)
        except Exception:  # noqa: BLE001  it may raise on arguments nobody foresaw: they do not match
            return False
        return bool(result["valid"])
