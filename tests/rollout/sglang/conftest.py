"""Tests against a real SGLang server run only when asked for; then a skipped test is a failure.

MOSAIC_TEST_SGLANG=1 python -m pytest tests/rollout/sglang     (make test-sglang)
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from mosaic_fast.policy import Policy
from mosaic_rollout.engine.sglang import SGLangEngine
from tests.rollout.sglang.serving import EMBEDDED, make_engine, serve

ASKED_FOR = bool(os.environ.get("MOSAIC_TEST_SGLANG"))
collect_ignore_glob = [] if ASKED_FOR else ["test_real_*.py"]
_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "sglang" in report.nodeid:
        _skipped.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if ASKED_FOR and _skipped:
        print(f"\nskipped, which counts as failed here: {', '.join(_skipped)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def policy() -> Policy:
    """The embedded model. Tests that change its weights use a copy."""
    torch.set_num_threads(1)
    return Policy.from_pretrained(EMBEDDED)


@pytest.fixture(scope="session")
def engine(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    """A running server in deterministic mode, shared by all tests; each leaves it serving `policy`."""
    engine = make_engine(policy, tmp_path_factory.mktemp("sglang"))
    serve(engine, engine.health)
    yield engine
    engine.close()
