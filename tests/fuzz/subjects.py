"""Everything that reads what somebody else wrote."""

from __future__ import annotations

from tests.fuzz import (
    answers,
    configurations,
    conversations,
    folders,
    guests,
    kept,
    outputs,
    templates,
    verdicts,
)
from tests.fuzz.subject import Subject

SUBJECTS: tuple[Subject, ...] = (
    *(configurations.FILES, configurations.COMMAND_LINES, configurations.RUN_FOLDERS, kept.KEPT),
    conversations.CONVERSATIONS,
    *(outputs.TASKS, outputs.PARSED, outputs.ROLLOUTS, templates.TEMPLATES, folders.FOLDERS),
    *(guests.VERDICTS, guests.ARGUMENTS),
    *(answers.ENGINE, answers.JUDGE, answers.CHAT),
    verdicts.VERDICT,
)
