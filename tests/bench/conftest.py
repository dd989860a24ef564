"""bench/ is scripts, not a package: its folder is put on the path, as `python bench/run.py` does."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import measure  # noqa: E402
from cases import attention, forest, logprob, preference, rollout, scaling, step  # noqa: E402

TIMED = (attention, forest, logprob, preference, rollout, scaling, step)


def in_few_rounds(
    contenders: Mapping[str, Callable[[], object]], repeats: int, *args: object, **options: object
) -> measure.Result:
    """Timed as little as can be, whatever a case affords: no test looks at how long something took."""
    return measure.compare(contenders, min(repeats, measure.FEWEST), *args, **options)  # pyrefly: ignore


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in TIMED:
        monkeypatch.setattr(case, "compare", in_few_rounds)
