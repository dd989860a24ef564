"""[env]: the environments there are by name, and the tasks of a run."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, model_validator

from mosaic_fast.config.section import Count, CountOrZero, NonNegative, Section

ENVIRONMENTS = ("world", "agentdojo", "bfcl", "asb", "agent_safetybench", "agentharm", "privacylens")
"""Names of `env.name` beside module:Class."""
EVALUATION_ONLY = ("agentharm", "privacylens")
"""Their authors ask that nothing be trained on them."""
HAS_SUITES = ("agentdojo", "bfcl", "asb", "agentharm")
NEEDS_TASKS = {
    "agent_safetybench": "its released_data.json",
    "agentharm": "the folder of its data set",
    "privacylens": "its main_data.json",
}
"""Environment -> the data its user has to bring."""


class EnvConfig(Section):
    """The tasks."""

    name: str = "world"
    """`world`: simulated tools; a benchmark's name; `module:Class`: your own (docs/environments.md)."""
    tasks: str | None = None
    """module:Class: JSON Lines file of tasks; some benchmarks: their data, which you have to bring."""
    heldout_tasks: str | None = None
    """module:Class: the held-out tasks; without it every fifth row of env.tasks is held out."""
    suites: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """agentdojo: suites (banking, slack); bfcl: categories (multi_turn_base); asb: agents (all);
    agentharm: harmful, benign, chat (the first two)."""
    heldout_suites: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Suites that are the held-out split; default: a quarter of the tasks of env.suites."""
    attack: str | None = None
    """agentdojo: its attack (important_instructions_no_names); asb: observation or prompt (observation)."""
    demonstrations: CountOrZero = 0
    """agentdojo: solved training tasks that open every conversation, for models too small to be told."""
    max_observation_chars: Count = 16_000
    """Benchmarks, module:Class: longer tool outputs are cut there, and say so."""
    tool_timeout_s: NonNegative = 0.0
    """Seconds until a tool call becomes an error observation; 0: no limit, for bitwise repeatable runs."""
    eval_tasks: CountOrZero = 300
    """Held-out tasks, each played once, before and after training; all if there are fewer; 0: neither."""
    eval_every: CountOrZero = 0
    """Evaluate every so many steps as well, on a third of eval_tasks or all there are; 0: never."""

    @model_validator(mode="after")
    def _fits_the_name(self) -> EnvConfig:
        own = re.fullmatch(r"[\w.]+:\w+", self.name) is not None
        if self.name not in ENVIRONMENTS and not own:
            raise ValueError(
                f"env.name {self.name!r} is none of {', '.join(ENVIRONMENTS)}, nor your own as module:Class, "
                "for example bank:Bank for the class Bank in bank.py"
            )
        if self.tasks and not own and self.name not in NEEDS_TASKS:
            raise ValueError(f"env.tasks belongs to an environment of your own, env.name is {self.name!r}")
        if self.name in NEEDS_TASKS and not self.tasks:
            raise ValueError(f"env.name {self.name!r} needs env.tasks, {NEEDS_TASKS[self.name]}")
        for key in ("suites", "heldout_suites"):
            if getattr(self, key) and self.name not in HAS_SUITES:
                raise ValueError(f"env.{key} belongs to {', '.join(HAS_SUITES)}; env.name is {self.name!r}")
        if self.heldout_suites and self.name in EVALUATION_ONLY:
            raise ValueError(f"env.heldout_suites: all of {self.name} is held out; name parts in env.suites")
        if self.attack is not None and self.name not in ("agentdojo", "asb"):
            raise ValueError(f"env.attack belongs to agentdojo and asb; env.name is {self.name!r}")
        return self
