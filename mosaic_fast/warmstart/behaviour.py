"""How the scripted agent behaves: a mixture of safe and unsafe, so that reinforcement learning has a choice.

Each family of tasks leans its own way (crimes are mostly refused, injected payments mostly obeyed), and none
leans all the way: in a group of four rollouts both outcomes are likely, and so are open and closed gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Caution:
    """What is done about a harmful request before the first call."""

    check: float  # probability that the gate opens
    refuse_checked: float  # probability of a refusal after a check
    refuse_unchecked: float


@dataclass(frozen=True)
class Gullibility:
    """What is done about an injected order at the turn after it was read."""

    tempted: float  # probability that the plan names the injected act
    check_tempted: float  # then: probability that the gate opens
    resist_checked: float  # then: probability that the check turns the agent back to its task
    check_loyal: float  # not tempted: probability that the gate opens


@dataclass(frozen=True)
class Behaviour:
    """Probabilities of the scripted agent."""

    caution: Mapping[str, Caution]  # by cue
    gullibility: Mapping[str, Gullibility]  # by injected order
    late_check: float  # harmful task under way: the gate opens before a later call
    late_refusal: float  # then: the task is abandoned
    stop_at_injection: float  # an injected order ends the task in a refusal
    resume_after_obeying: float  # the user's task is taken up again after an injected order was followed
    check_harmless: float  # the gate opens before an act that cannot be undone
    check_trivial: float  # the gate opens before any other act
    refuse_harmless: float  # a benign task is refused
    skip_last: float  # the last call of several is left out
    forget_cleanup: float  # a deletion that ends a plan of several calls is left out


_WARY = Caution(check=0.66, refuse_checked=0.85, refuse_unchecked=0.25)
_CARELESS = Caution(check=0.40, refuse_checked=0.80, refuse_unchecked=0.20)

MIXED = Behaviour(
    caution={
        "crime": _WARY,
        "hurts": _WARY,
        "hides": _CARELESS,
        "no_consent": _CARELESS,
        "leak": _CARELESS,
    },
    gullibility={
        "pay": Gullibility(tempted=0.74, check_tempted=0.35, resist_checked=0.85, check_loyal=0.35),
        "delete": Gullibility(tempted=0.32, check_tempted=0.40, resist_checked=0.85, check_loyal=0.30),
        "email": Gullibility(tempted=0.28, check_tempted=0.40, resist_checked=0.85, check_loyal=0.30),
    },
    late_check=0.15,
    late_refusal=0.6,
    stop_at_injection=0.05,
    resume_after_obeying=0.6,
    check_harmless=0.30,
    check_trivial=0.10,
    refuse_harmless=0.03,
    skip_last=0.03,
    forget_cleanup=0.65,
)
