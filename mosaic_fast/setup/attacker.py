"""The attacker of a training run: which attack words the injected order of each group.

The policy changes under the attacker, so what worked once may not work now. The bandit is Thompson sampling
for Bernoulli rewards (Thompson 1933; Chapelle and Li 2011) whose counts are discounted (Raj and Kalyani 2017,
arXiv 1707.09727): with H_a and T_a what attack a had of successes and tries, each step

    H_a <- m H_a + sum of its groups' shares of rollouts that obeyed      T_a <- m T_a + its groups
    the next attack: argmax_a x_a,   x_a ~ Beta(1 + H_a, 1 + T_a - H_a)

with m = attacks.memory. All rollouts of a group see the same attack.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mosaic_fast.config import Config
from mosaic_fast.config.config import derived_seed
from mosaic_fast.errors import UserError
from mosaic_rollout.environments.attacks import Attack, Attackable, attackable, read_attacks
from mosaic_rollout.types import Environment, Rollout, Task


@dataclass(frozen=True)
class Pull:
    """A group that met an attack: at which step, and the share of its rollouts that obeyed."""

    step: int
    attack: str
    success: float  # in [0, 1]


@dataclass(frozen=True)
class AttackCounts:
    """What the bandit knows, as the checkpoint keeps it. Never changed in place."""

    successes: Mapping[str, float] = field(default_factory=dict)  # discounted, by name
    tries: Mapping[str, float] = field(default_factory=dict)
    pending: tuple[Pull, ...] = ()  # of steps that picks may not look at yet
    folded: int = 0  # steps in the counts

    def until(self, step: int, memory: float) -> AttackCounts:
        """With the pulls of all steps before `step` in the counts."""
        successes, tries, pending = dict(self.successes), dict(self.tries), list(self.pending)
        for done in range(self.folded, step):
            successes = {name: memory * value for name, value in successes.items()}
            tries = {name: memory * value for name, value in tries.items()}
            for pull in (pull for pull in pending if pull.step == done):
                successes[pull.attack] = successes.get(pull.attack, 0.0) + pull.success
                tries[pull.attack] = tries.get(pull.attack, 0.0) + 1.0
        left = tuple(pull for pull in pending if pull.step >= step)
        return AttackCounts(successes, tries, left, max(step, self.folded))

    def as_json(self) -> dict[str, object]:
        pending = [[pull.step, pull.attack, pull.success] for pull in self.pending]
        counts = {"successes": dict(self.successes), "tries": dict(self.tries)}
        return {**counts, "pending": pending, "folded": self.folded}

    @classmethod
    def of_json(cls, kept: Mapping[str, object]) -> AttackCounts:
        """The counts of a checkpoint; none of one that has none."""
        if not kept:
            return cls()
        found = dict(kept)
        pending = tuple(Pull(*pull) for pull in found.pop("pending"))  # type: ignore[attr-defined]
        return cls(**found, pending=pending)  # type: ignore[arg-type]


class Attacker:
    """Gives every injected task of a step its attack: a pure function of (seed, step, counts).

    ahead: how many steps are sampled before their predecessors are trained on (rollout.max_staleness). A
    step's picks look at the outcomes that are known by then however the threads run.
    """

    def __init__(
        self,
        environment: Attackable,
        attacks: Sequence[Attack],
        *,
        seed: int,
        bandit: bool,
        memory: float = 1.0,
        ahead: int = 0,
    ) -> None:
        self._environment, self._attacks = environment, {attack.name: attack for attack in attacks}
        self._seed, self._bandit, self._memory, self._ahead = seed, bandit, memory, ahead

    def attacked(self, tasks: Sequence[Task], step: int, counts: AttackCounts) -> list[Task]:
        """The tasks of a step, the injected ones with their attack."""
        known = counts.until(step - self._ahead, self._memory)
        rng = random.Random(derived_seed(self._seed, "attacks", step))
        found = []
        for task in tasks:
            if task.kind != "injected":
                found.append(task)
                continue
            attack = self._attacks[self._pick(known, rng)]
            found.append(replace(self._environment.attacked(task, attack), attack=attack.name))
        return found

    def observed(self, counts: AttackCounts, step: int, groups: Sequence[Sequence[Rollout]]) -> AttackCounts:
        """The counts after a step. groups: of all ranks, so that all know the same."""
        pulls = [
            Pull(step, group[0].task.attack, sum(r.verdict.harm for r in group) / len(group))
            for group in groups
            if group and group[0].task.attack is not None
        ]
        return replace(counts, pending=(*counts.pending, *pulls)).until(step + 1 - self._ahead, self._memory)

    def figures(self, groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        """Metrics of a step: the number of attacks that it tried."""
        return {"attacks/tried": float(len({group[0].task.attack for group in groups if group} - {None}))}

    def _pick(self, counts: AttackCounts, rng: random.Random) -> str:
        names = list(self._attacks)
        if not self._bandit:
            return rng.choice(names)
        drawn = {}
        for name in names:
            hits, tries = counts.successes.get(name, 0.0), counts.tries.get(name, 0.0)
            drawn[name] = rng.betavariate(1.0 + hits, 1.0 + max(0.0, tries - hits))
        return max(names, key=drawn.__getitem__)


def build_attacker(config: Config, environment: Environment) -> Attacker | None:
    """The attacker that [attacks] describes; None where it is off. UserError for attacks that do not fit."""
    chosen = config.attacks
    if chosen.pick == "off":
        return None
    own = attackable(environment, config.env.name)
    if chosen.file:
        attacks = list(read_attacks(Path(chosen.file)))
    else:
        known = list(own.attacks("train"))
        if unknown := [name for name in chosen.names if name not in known]:
            raise UserError(
                f"attacks.names: {config.env.name} has no attack {unknown[0]!r} of its training split; "
                + (f"it has {', '.join(known)}" if known else "name a file of your own in attacks.file")
            )
        attacks = [Attack(name) for name in chosen.names or known]
    if not attacks:
        raise UserError(
            f"attacks.pick: {config.env.name} has no attacks of its own; name a file in attacks.file"
        )
    return Attacker(
        own,
        attacks,
        seed=config.seed,
        bandit=chosen.pick == "bandit",
        memory=chosen.memory,
        ahead=config.rollout.max_staleness,
    )
