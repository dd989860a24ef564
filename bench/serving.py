"""What an engine served while a workload was played: tokens a second, prefix hits, time to first token."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mosaic_fast.config import Config, EngineConfig
from mosaic_fast.setup.engine import build_engine
from mosaic_fast.setup.model_folder import load_policy, model_folder
from mosaic_kernels import pack_forest
from mosaic_rollout.engine.sglang import SGLangEngine
from mosaic_rollout.types import Completion


@dataclass(frozen=True)
class Turn:
    """One request and its answer: a prompt of token ids, and what was sampled after it."""

    prompt: np.ndarray  # [L] int64
    completion: Completion


@dataclass(frozen=True)
class Served:
    """Sums over one round."""

    generated_tokens: int
    prefix_hit_frac: float  # prompt tokens not computed / prompt tokens
    ideal_hit_frac: float  # what the requests' own sharing allows
    first_token_s: tuple[float, ...]  # from asking to the first token, waiting included


@dataclass
class Round:
    """One timed round; `served` of an engine that has such figures, else generated_tokens."""

    seconds: float = 0.0
    served: Served | None = None
    generated_tokens: int = 0

    @classmethod
    @contextmanager
    def timed(cls, rounds: list[Round]) -> Iterator[Round]:
        """Times what it encloses and adds it to the list."""
        one, start = cls(), time.perf_counter()
        yield one
        one.seconds = time.perf_counter() - start
        rounds.append(one)

    @property
    def tokens_per_s(self) -> float:
        return (self.served.generated_tokens if self.served else self.generated_tokens) / self.seconds

    def figures(self, engine: str) -> dict[str, float]:
        """What goes to the results' file, by <engine>_<figure>."""
        one = self.served
        if one is None:
            return {}
        first, late = (float(q) for q in np.percentile(one.first_token_s, [50, 95]))
        return {
            f"{engine}_prefix_hit_frac": one.prefix_hit_frac,
            f"{engine}_ideal_hit_frac": one.ideal_hit_frac,
            f"{engine}_first_token_s": first,
            f"{engine}_first_token_95th_s": late,
        }


def served(agents: Sequence[Sequence[Turn]], first_token_s: Iterable[float]) -> Served:
    """The figures of one round; agents[a] are agent a's turns, each prompt longer than the one before."""
    turns = [turn for agent in agents for turn in agent]
    prompt_tokens = sum(len(turn.prompt) for turn in turns)
    cached = sum(turn.completion.cached_tokens for turn in turns)
    return Served(
        generated_tokens=sum(len(turn.completion.token_ids) for turn in turns),
        prefix_hit_frac=cached / prompt_tokens,
        ideal_hit_frac=1.0 - _must_compute(agents) / prompt_tokens,
        first_token_s=tuple(first_token_s),
    )


def _must_compute(agents: Sequence[Sequence[Turn]]) -> int:
    """Distinct (prefix, token) of all prompts, without those that sampling an earlier turn has computed.

    Sampling computes what it sampled but for a turn's last token. The last token of a prompt is counted as
    every other: engines compute it anew each time, so the ideal is a little out of reach.
    """
    forest = pack_forest([agent[-1].prompt for agent in agents])
    needed = np.ones(forest.num_tokens, dtype=bool)
    for agent, offset in zip(agents, forest.cu_seqlens, strict=False):
        for turn in agent[:-1]:
            start = offset + len(turn.prompt)
            needed[start : start + len(turn.completion.token_ids) - 1] = False
    return len(np.unique(forest.node_index[needed]))


def print_serving(name: str, engines: Mapping[str, Sequence[Round] | str]) -> None:
    """A row an engine: the figures of its rounds, or why it was not run."""
    table = Table(title=f"{name}: serving")
    for head in ("engine", "tokens/s", "spread", "prefix hit", "ideal", "of ideal", "first token", "95th"):
        table.add_column(head, justify="left" if head == "engine" else "right")
    missing = []
    for engine, rounds in engines.items():
        if isinstance(rounds, str):
            missing.append(f"{engine}: {rounds}")
            continue
        rates = [one.tokens_per_s for one in rounds]
        row = [
            f"{statistics.median(rates):.0f}",
            f"{(max(rates) - min(rates)) / statistics.median(rates):.0%}",
        ]
        last = rounds[-1].served
        if last is not None:
            hit, ideal = last.prefix_hit_frac, last.ideal_hit_frac
            row += [f"{hit:.1%}", f"{ideal:.1%}", f"{hit / ideal:.1%}" if ideal else ""]
            row += [f"{1e3 * q:.0f} ms" for q in np.percentile(last.first_token_s, [50, 95])]
        table.add_row(engine, *row)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table, *missing, sep="\n", highlight=False)


_PYTHON = Path(__file__).parents[1] / ".venv-sglang" / "bin" / "python"


def sglang_installed() -> bool:
    return _PYTHON.is_file()


@contextmanager
def sglang_engine() -> Iterator[SGLangEngine | str]:
    """The engine, whose server starts at the first update_weights; or why there is none."""
    if not sglang_installed():
        yield "not run: SGLang is not installed; make sglang puts it into .venv-sglang"
        return
    config = Config(engine=EngineConfig(kind="sglang", device="cpu", python=str(_PYTHON)))
    engine = build_engine(config, load_policy(config, model_folder("embedded")))
    assert isinstance(engine, SGLangEngine)
    try:
        yield engine
    finally:
        engine.close()
