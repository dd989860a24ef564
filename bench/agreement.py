"""What must hold before a contender is timed: its results are the expected ones.

    fp32  every result within 1e-4 of the exact one, in the 2-norm and in the largest value. Exact is fp64, of
          gradients of whole models the flat batch's in fp32
    bf16  the project's criterion (docs/kernels.md, "Proof"): the error in the 2-norm is at most 2 times
          (gradients 3 times) that of the flat batch in bf16, plus 8e-3, both against the exact result. So the
          limit is what plain PyTorch loses in this precision on these very inputs; that the flat batch itself
          is right shows in an error below 0.1. Exact is fp64, of gradients of whole models fp32 with the same
          weights

A contender of the project that is off ends the run. A package of others that fails or is off here, or
whatever has no room, is listed with the reason and is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic_kernels.selfcheck import deviations_of

TOLERANCE = 1e-4  # fp32
PLAIN_TOLERANCE = 0.1  # of the flat batch in bf16

Missing = dict[str, str]  # contender -> why it is not timed

OTHERS = {
    "flex": "FlexAttention",
    "flash": "flash-attn",
    "varlen": "torch.nn.attention.varlen",
    "flat_flash": "flash-attn, padded rows",
    "packed_flash": "flash-attn, packed rows",
    "liger": "Liger",
    "cce": "cut-cross-entropy",
    "cce_exact": "cut-cross-entropy, unfiltered",
    "flash_pref": "flash-pref",
    "trl": "TRL",
}
"""Contenders that are packages of others, with the names under which they are listed."""


@dataclass(frozen=True)
class Expected:
    """The right results by name; those that are gradients are named "d ..."."""

    exact: Mapping[str, Tensor]
    plain: Mapping[str, Tensor] | None = None  # of the flat batch in bf16; None: results are fp32

    def __post_init__(self) -> None:
        """AssertionError where the flat batch errs by more than bf16 can explain."""
        if self.plain is not None:
            for name, one in deviations_of(self.plain, self.plain, self.exact, torch.bfloat16).items():
                assert one.error < PLAIN_TOLERANCE, f"flat: {name} is off by {one.error:.1e}"

    def check(self, contender: str, found: Mapping[str, Tensor]) -> None:
        """Compare a contender's results. AssertionError names the first that is off."""
        strange = set(found) ^ set(self.exact)
        assert not strange, f"{contender} has, or lacks: {', '.join(sorted(strange))}"
        if self.plain is not None:
            deviations = deviations_of(found, self.plain, self.exact, torch.bfloat16)
            for name, one in deviations.items():
                # `not <=` also catches a NaN
                assert one.error <= one.limit, (
                    f"{contender}: {name} is off by {one.error:.1e}, limit {one.limit:.1e}"
                )
            return
        for name, right in self.exact.items():
            right = right.detach()
            difference = found[name].detach().to(right.device) - right
            error = max(
                float(difference.norm() / right.norm().clamp_min(1e-9)),
                float(difference.abs().max() / right.abs().max().clamp_min(1e-9)),
            )
            assert error < TOLERANCE, f"{contender}: {name} is off by {error:.1e}"


def missing_of(
    contenders: Iterable[str], check: Callable[[str], None], *, trusted: tuple[str, ...] = ("flat",)
) -> Missing:
    """Check each contender but the trusted ones; returns those that are not to be timed.

    Raises what the check raised for contenders of the project's own; OutOfMemoryError for ours and flat.
    """
    missing: Missing = {}
    for one in contenders:
        if one in trusted:
            continue
        try:
            check(one)
        except torch.OutOfMemoryError:
            if one in ("ours", "flat"):
                raise
            missing[one] = "out of memory"
        except Exception as error:  # a package's error may be of any kind, and none may end the run
            if one not in OTHERS:
                raise
            said = str(error).strip().splitlines()
            missing[one] = f"{type(error).__name__}: {said[0][:120] if said else 'without a word'}"
    return missing
