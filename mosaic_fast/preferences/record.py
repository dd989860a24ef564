"""What a judge was really asked, for the run folder: the rubric's text and hash, and the request as sent."""

from __future__ import annotations

import json
from pathlib import Path

from mosaic_fast.preferences.judge import Judge
from mosaic_fast.preferences.llm_judge import LLMJudge
from mosaic_fast.preferences.prompt import KEPT


def probe_judge(judge: Judge | None) -> None:
    """One small question to a judge behind a URL. UserError where it gives no valid answer."""
    if isinstance(judge, LLMJudge):
        judge.probe()


def judge_record(judge: Judge | None) -> dict[str, object]:
    """What the answers of an LLM judge depend on; empty for other judges."""
    return judge.record() if isinstance(judge, LLMJudge) else {}


def keep_judge_record(judge: Judge | None, run_folder: Path) -> None:
    """judge.json and, of a user's rubric, a copy in the run folder; nothing for other judges."""
    if not isinstance(judge, LLMJudge):
        return
    if judge.rubric.text is not None:
        _write(run_folder, KEPT, judge.rubric.text)
    _write(run_folder, "judge.json", json.dumps(judge.record(), indent=1) + "\n")


def _write(folder: Path, name: str, text: str) -> None:
    unfinished = folder / f".tmp-{name}"
    unfinished.write_bytes(text.encode("utf-8"))
    unfinished.replace(folder / name)
